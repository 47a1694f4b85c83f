"""`python -m tools.bench session MODEL [FORM …]`: sessions on a diffusion transformer, a decoder and an encoder."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calib.provider import SessionOptions, create_session
from onnxslim_ptq import quantize
from onnxslim_ptq.frontends import session as api
from tools.dit import sampling
from tools.zoo import load
from tools.zoo.session import evaluate, open_session

from .decoder import Decoder, against, losses_of
from .machine import ROOT, stamp
from .tables import markdown, number, refresh
from .timing import medians_ms

OUT = ROOT / "docs" / "benchmarks-session.md"
SEEDS = range(64)
CALIBRATION_SEEDS = range(1000, 1032)
TIMESTEP_SEP = 25
_ROUNDS = 15
_HEAD = """# Sessions, measured

Written by `python -m tools.bench session`; do not edit by hand. What the [processors](session.md) cost in accuracy, the
last linear layer float as in msModelSlim; recipes are run as they are.
"""
_ABOUT = {
    "dit": """## A diffusion transformer on digits

`tools/dit/dit.onnx`, trained by `python -m tools.dit.train`: 64 images from fixed seeds, each by 50 steps of DDIM.
Calibration: 32 other seeds, every step of the loop a sample, some of which are held out. dB: signal to noise of the
final image against the float model's, mean over the seeds ± its standard error; `least`: of the worst image.
`w8a8_timestep` is dynamic below step 25 unless another is named. In brackets: `act_method`; the document's `minmax`,
the mean of the samples' extremes, clips what few samples reach. Goals: `w8a8_timestep` at least `w8a8` − 0.3 dB, with
the same `act_method`, and at least `w8a8_dynamic` − 1 dB. The first is kept with either method, the second with
`minmax-global` from step 40 on. From step 25 on, one scale for all tokens costs 0.4 to 0.5 dB each in front of queries,
keys and values, of `fc1` and of `fc2` (on 64 further seeds); with 128 seeds to calibrate it costs the same, so it is
the size of the integers' steps and not clipping. With eight, late steps clip.
""",
    "smollm2": """## A decoder

SmolLM2-135M: perplexity over 32 windows of 256 tokens of held-out text, each fed in chunks of 1 to 64 tokens through
the model's cache. Calibration: four windows. `against float`: exp of the mean growth of a token's -log p, with its
standard error from whole windows. `SQNR`: of the logits of one window. Goals: `w8a8_dynamic` at most 1.03 × float
alone, 1.015 × with m4 or m6; fa3 costs at most 1 dB.
""",
    "minilm": """## An encoder

all-MiniLM-L6-v2: worst SQNR of the token embeddings over the 50 evaluation texts, Spearman correlation with people's
judgement, and latency over the float model's at 128 tokens, medians of rounds in which both take turns, with one thread
and with two. Calibration: 16 texts. Goals: 27 dB with weights rounded to nearest, 29 dB with a rounder, latency at most
0.5: the Mul, Div and Add around the integer products do not gain from the second thread as float products do.
A few inputs of the feed-forward blocks' second layers have weights up to 55 times those of the others and set the
scale of every output channel; no processor of a session evens them out, as the recipes with `unfused` groups do. With
`layer.0.output.dense` in `disable_names` the session `m4 + w8a8_dynamic` reaches 27.1 dB.
""",
}
_DYNAMIC = {"per": "token", "when": "dynamic"}
_GPTQ = {"type": "quantize", "rounder": {"type": "gptq"}, "act": _DYNAMIC, "bias_correction": False}
RECIPES: dict[str, Any] = {
    "recipe w8a8-dynamic": "w8a8-dynamic",
    "recipe w8a8-dynamic-smooth": "w8a8-dynamic-smooth",
    "w8a8-dynamic, gptq": {"steps": [_GPTQ]},
    "recipe w8a8-dynamic-best": "w8a8-dynamic-best",
}
FORMS: dict[str, tuple[str, ...]] = {
    "dit": (
        "w8a8", "w8a8 (minmax-global)", "w8a8_dynamic", "w8a8_timestep", "w8a8_timestep (minmax-global)",
        "w8a8_timestep (minmax-global, from 40)", "w8a8_timestep (minmax-global, from 45)",
        "m3 + w8a8", "m4 + w8a8", "m6 + w8a8",
        "m3 + w8a8 (minmax-global)", "m4 + w8a8 (minmax-global)", "m6 + w8a8 (minmax-global)",
        "m3 + w8a8_timestep (minmax-global)", "m4 + w8a8_dynamic", "w8a8_dynamic + fa3",
    ),
    "smollm2": (
        "float", "w8a8_dynamic", "m4 + w8a8_dynamic", "m6 + w8a8_dynamic", "w8a8_dynamic + fa3",
        "recipe w8a8-dynamic-smooth",
    ),
    "minilm": ("w8a8_dynamic", "m4 + w8a8_dynamic", "m6 + w8a8_dynamic", "w8a8_dynamic + fa3", *RECIPES),
}  # fmt: skip
Samples = Sequence[Mapping[str, Any]]


def processors(form: str) -> dict[str, Any]:
    """The processors of ``form``, names joined by plus signs; what no bracket says is as in the document."""
    found = [_NAME.fullmatch(part) for part in form.split(" + ")]
    return {
        one["name"]: _processor(one["name"], one["method"] or "minmax", one["sep"]) for one in found if one
    }


_NAME = re.compile(r"(?P<name>\w+)(?: \((?P<method>[\w-]+)(?:, from (?P<sep>\d+))?\))?")


def _processor(name: str, method: str, sep: str | None) -> Any:
    makers: Mapping[str, Callable[[], Any]] = {
        "w8a8": lambda: api.W8A8ProcessorConfig(cfg=api.W8A8QuantConfig(act_method=method), disable_names=[]),
        "w8a8_dynamic": lambda: api.W8A8DynamicProcessorConfig(
            cfg=api.W8A8DynamicQuantConfig(), disable_names=[]
        ),
        "w8a8_timestep": lambda: api.W8A8TimeStepProcessorConfig(
            cfg=api.W8A8TimeStepQuantConfig(act_method=method),
            disable_names=[],
            timestep_sep=int(sep or TIMESTEP_SEP),
        ),
        "m3": api.M3ProcessorConfig,
        "m4": api.M4ProcessorConfig,
        "m6": lambda: api.M6ProcessorConfig(cfg=api.M6Config()),
        "fa3": api.FA3ProcessorConfig,
    }
    return makers[name]()


def make(form: str, model: Path, samples: Samples, path: Path, held_out: Samples | None = None) -> float:
    """Quantize ``model`` as ``form`` says and write the graph to ``path``; the worst output's SQNR in dB."""
    if form in RECIPES:
        result = quantize(model, RECIPES[form], samples, eval_data=held_out, min_sqnr=0)
    else:
        config = api.SessionConfig(processor_cfg_map=processors(form), calib_data=list(samples))
        result = api.quant_model(model, config, eval_data=held_out)
    result.save(path)
    return float(result.metrics["sqnr_db"])


def denoising_samples(seeds: range = CALIBRATION_SEEDS, steps: int = sampling.STEPS) -> list[dict[str, Any]]:
    """What the float model is fed in the loop, a sample per step with its index."""
    seen: list[dict[str, Any]] = []
    run = runner(sampling.MODEL)

    def watched(index: int, feed: sampling.Feed) -> np.ndarray:
        seen.append({"timestep_idx": index, **feed})
        return run(index, feed)

    sampling.sample(watched, seeds, steps)
    return seen


def runner(path: Path) -> sampling.Run:
    """The model at ``path`` as the loop calls it; one that switches by the step gets it."""
    session = create_session(path, options=SessionOptions())
    inputs = {value.name for value in session.get_inputs()}

    def run(index: int, feed: sampling.Feed) -> np.ndarray:
        api.TimestepManager.set_timestep_idx(index)
        given = api.TimestepManager.feed(feed) if "timestep_idx" in inputs else dict(feed)
        return np.asarray(session.run(None, given)[0])

    return run


def measure_dit(form: str, folder: Path) -> dict[str, Any]:
    """Mean, its standard error and the least signal to noise of the final images."""
    path = folder / "dit.onnx"
    make(form, sampling.MODEL, denoising_samples(), path)
    images = [sampling.sample(runner(which), SEEDS) for which in (sampling.MODEL, path)]
    found = sampling.decibels(*images)
    return {"db": float(found.mean()), "error": float(found.std(ddof=1) / len(found) ** 0.5),
            "least": float(found.min())}  # fmt: skip


def measure_smollm2(form: str, folder: Path) -> dict[str, Any]:
    """SQNR of the logits of one window, and losses of every token in nats."""
    case = load("smollm2")
    path, decibels = case.model, None
    if form != "float":
        path = folder / "smollm2.onnx"
        samples = [case.calibration[i] for i in range(0, 64, 16)]
        decibels = make(form, case.model, samples, path, [case.evaluation[39]])
    with np.load(case.model.parent / "tokens.npz") as arrays:
        found = losses_of(Decoder(path), arrays["evaluation"])
    return {"db": decibels, "losses": found.tolist()}


def measure_minilm(form: str, folder: Path) -> dict[str, Any]:
    """SQNR of the embeddings, the task's metric, and latency over float's."""
    case = load("minilm")
    path = folder / "minilm.onnx"
    texts = list(case.evaluation)
    decibels = make(form, case.model, [case.calibration[i] for i in range(0, 64, 4)], path, texts)
    latency = {}
    for threads in (1, 2):
        sessions = [open_session(which, threads) for which in (case.model, path)]
        exact, seen = medians_ms(sessions, case.latency_feed, _ROUNDS)
        latency[f"latency {threads}"] = seen / exact
    return {"db": decibels, **evaluate(case, path), **latency}


def rows_of(model: str, found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a model's table."""
    if model == "dit":
        rows = [
            [f"`{f}`", f"{r['db']:.2f} ± {r['error']:.2f}", f"{r['least']:.1f}"] for f, r in found.items()
        ]
        return ["session", "dB", "least"], rows
    if model == "minilm":
        rows = [
            [
                f"`{form}`",
                f"{r['db']:.1f}",
                f"{r['spearman']:.4f}",
                f"{r['latency 1']:.2f}",
                f"{r['latency 2']:.2f}",
            ]
            for form, r in found.items()
        ]
        return ["form", "SQNR dB", "spearman", "1 thread", "2 threads"], rows
    losses = {form: np.array(r["losses"]) for form, r in found.items()}
    rows = []
    for form, one in losses.items():
        ratio, error = against(one, losses["float"])
        decibels = number(found[form]["db"], 1)
        rows.append([f"`{form}`", decibels, f"{np.exp(one.mean()):.3f}", f"{ratio + 1:.4f} ± {error:.4f}"])
    return ["form", "SQNR dB", "perplexity", "against float"], rows


_MEASURE = {"dit": measure_dit, "smollm2": measure_smollm2, "minilm": measure_minilm}


def main(arguments: Sequence[str]) -> int:
    """Measure, and write the model's section; forms that are not named keep the result that ``--folder`` has."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench session", description=__doc__)
    parser.add_argument("model", choices=list(FORMS))
    parser.add_argument("forms", nargs="*", metavar="FORM", help="to measure (default: all)")
    parser.add_argument("--folder", type=Path, required=True, help="where models and results are kept")
    parser.add_argument("--out", type=Path, default=OUT, help="Markdown file to refresh")
    options = parser.parse_args(arguments)
    known = FORMS[options.model]
    if unknown := [form for form in options.forms if form not in known]:
        parser.error(f"no form {unknown[0]!r} of {options.model}; known: {', '.join(known)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / f"results-{options.model}.json"  # the weights JSON of the model is another file
    found = json.loads(kept.read_text()) if kept.exists() else {}
    forms = options.forms or list(known)
    if "float" in known and "float" not in [*found, *forms]:
        forms = ["float", *forms]
    for form in forms:
        found[form] = _MEASURE[options.model](form, options.folder)
        kept.write_text(json.dumps(found))
        print(form, {key: value for key, value in found[form].items() if key != "losses"}, flush=True)
    ordered = {form: found[form] for form in known if form in found}
    command = f"python -m tools.bench session {options.model} --folder FOLDER"
    marks = "\n".join(f"- {what}: {value}" for what, value in stamp(command).items())
    table = markdown(*rows_of(options.model, ordered))
    refresh(options.out, options.model, f"{_ABOUT[options.model]}\n{table}\n{marks}", _HEAD, tuple(FORMS))
    print(table)
    return 0
