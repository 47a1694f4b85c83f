"""python -m tools.bench.decoder [FORM …]: SmolLM2 with an int8 KV cache, written to docs/benchmarks-decoder.md.

Perplexity over 32 windows of 256 tokens, each fed in chunks of 1 to 64 tokens through the model's own cache; the same
chunks for every form. Agreement: how often a form's most likely token is float's next one, along float's own greedy
continuations of 5 prompts of 32 tokens (200 tokens each), fed in such chunks as well. The forms are those of
`onnxslim_ptq.frontends.golden_stick`, calibrated with 8 windows of 256 tokens, `lm_head` float.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calib.model import open_model
from calib.provider import SessionOptions, create_session
from onnxslim_ptq.frontends.golden_stick import (
    PTQ,
    BackendTarget,
    OutliersSuppressionType,
    PTQConfig,
    QuantGranularity,
    int8,
)
from tools.zoo import load

from .machine import ROOT, stamp

_WINDOW, _WINDOWS, _LONGEST = 256, 32, 64
_PROMPTS, _PROMPT, _CONTINUED = 5, 32, 200
_SAMPLES = 8
_SMOOTH = {"act_quant_dtype": int8, "outliers_suppression": OutliersSuppressionType.SMOOTH}
_TOKEN = QuantGranularity.PER_TOKEN
FORMS: dict[str, dict[str, Any]] = {
    "float": {},
    "C8 per channel": {"weight_quant_dtype": None, "kvcache_quant_dtype": int8},
    "C8 per token": {
        "weight_quant_dtype": None,
        "kvcache_quant_dtype": int8,
        "kvcache_quant_granularity": _TOKEN,
    },
    "W8A8+SMOOTH+C8": {**_SMOOTH, "kvcache_quant_dtype": int8},
    "W8A8 per token+SMOOTH+C8": {**_SMOOTH, "act_quant_granularity": _TOKEN, "kvcache_quant_dtype": int8},
    "W8A8+SMOOTH": _SMOOTH,
    "W8A8 per token+SMOOTH": {**_SMOOTH, "act_quant_granularity": _TOKEN},
}


class Decoder:
    """A decoder fed through its cache, whatever type that has."""

    def __init__(self, path: Path) -> None:
        model = open_model(path)
        self.session = create_session(path, options=SessionOptions())
        self.outputs = [o.name for o in model.proto.graph.output]
        self.empty = {
            i.name: np.zeros([d if isinstance(d, int) else int(d == "batch") for d in i.shape or ()], i.dtype)
            for i in model.inputs()
            if i.name.startswith("past")
        }
        self.reset()

    def reset(self) -> None:
        self.past, self.length = dict(self.empty), 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits [tokens, vocabulary] of the next tokens; the cache grows by them."""
        end = self.length + len(ids)
        feed = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.length, end)[None],
            **self.past,
        }
        found = dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        self.length = end
        return np.asarray(found["logits"][0])

    @property
    def bytes_per_token(self) -> float:
        return sum(values.nbytes for values in self.past.values()) / self.length


@dataclass
class Measured:
    """``losses`` of every token in nats; ``hits`` along each prompt's continuation."""

    losses: np.ndarray
    cache: float
    hits: np.ndarray


def chunks(length: int, rng: np.random.Generator) -> Iterator[int]:
    """Lengths from 1 to 64 that add up to ``length``."""
    while length > 0:
        size = min(length, int(rng.integers(1, _LONGEST + 1)))
        yield size
        length -= size


def losses_of(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """-log p of every token of the windows, given those before it in its window."""
    found: list[np.ndarray] = []
    rng = np.random.default_rng(0)
    for start in range(0, _WINDOW * _WINDOWS, _WINDOW):
        model.reset()
        at = start
        for size in chunks(_WINDOW, rng):
            logits = model.step(tokens[at : at + size]).astype(np.float64)
            wanted = tokens[at + 1 : at + size + 1]
            top = logits.max(axis=1)
            total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            found.append(total - logits[np.arange(size), wanted])
            at += size
    return np.concatenate(found)


def continuations(model: Decoder, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the model itself says next, greedily."""
    said = []
    for prompt in prompts:
        model.reset()
        following = [int(model.step(prompt)[-1].argmax())]
        while len(following) < _CONTINUED:
            following.append(int(model.step(np.array(following[-1:]))[-1].argmax()))
        said.append(np.array(following))
    return said


def hits_of(model: Decoder, prompts: Sequence[np.ndarray], said: Sequence[np.ndarray]) -> np.ndarray:
    """Whether the most likely token is the one that was said, with what was said before it fed in."""
    hits, rng = [], np.random.default_rng(1)
    for prompt, following in zip(prompts, said, strict=True):
        model.reset()
        tokens, guesses = np.concatenate([prompt, following[:-1]]), []
        for size in chunks(len(tokens), rng):
            guesses += model.step(tokens[model.length : model.length + size]).argmax(axis=1).tolist()
        hits.append(np.array(guesses[len(prompt) - 1 :]) == following)
    return np.array(hits)


def model_of(form: str, folder: Path) -> Path:
    """The written model of that form."""
    case = load("smollm2")
    if form == "float":
        return Path(case.model)
    path = folder / f"{form.replace(' ', '_')}.onnx"
    if not path.exists():
        ptq = PTQ(PTQConfig(backend=BackendTarget.NONE, opname_blacklist=["head"], **FORMS[form]))
        samples = [case.calibration[i] for i in range(0, 64, 64 // _SAMPLES)]
        ptq.convert(ptq.apply(case.model, datasets=samples)).save(path)
    return path


def measure(form: str, folder: Path) -> None:
    """Measure and keep the results in ``folder``."""
    exported = load("smollm2").model.parent
    with np.load(exported / "tokens.npz") as arrays:
        tokens, others = arrays["evaluation"], arrays["calibration"]
    starts = np.linspace(0, len(others) - _PROMPT, _PROMPTS).astype(int)
    prompts = [others[s : s + _PROMPT] for s in starts]
    model = Decoder(model_of(form, folder))
    kept = folder / "continuations.npy"
    if form == "float" and not kept.exists():
        np.save(kept, np.array(continuations(model, prompts)))
    hits = hits_of(model, prompts, np.load(kept))
    losses = losses_of(model, tokens)
    np.savez(folder / f"{form.replace(' ', '_')}.npz", losses=losses, hits=hits, cache=model.bytes_per_token)


def table(folder: Path) -> str:
    """The rows of every form that was measured; needs float's."""
    measured: dict[str, Measured] = {}
    for form in FORMS:
        path = folder / f"{form.replace(' ', '_')}.npz"
        if path.exists():
            with np.load(path) as kept:
                measured[form] = Measured(kept["losses"], float(kept["cache"]), kept["hits"])
    exact = measured["float"]
    rows = [
        "| form | perplexity | against float | standard error | cache bytes per token | share | same token as float |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for form, one in measured.items():
        ratio, error = against(one.losses, exact.losses)
        rows.append(
            f"| {form} | {np.exp(one.losses.mean()):.3f} | {ratio:+.2%} | {error:.2%} | {one.cache:,.0f} "
            f"| {one.cache / exact.cache:.1%} | {one.hits.mean():.1%} |"
        )
    return "\n".join(rows)


def against(losses: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Perplexity over float's, minus 1, and its standard error from the paired differences of whole windows."""
    differences = (losses - exact).reshape(_WINDOWS, _WINDOW).mean(axis=1)
    ratio = float(np.exp(differences.mean()))
    return ratio - 1, float(differences.std(ddof=1) / np.sqrt(len(differences)) * ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("forms", nargs="*", metavar="FORM", help=f"of {', '.join(FORMS)} (default: all)")
    parser.add_argument("--folder", type=Path, required=True, help="where models and results are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks-decoder.md")
    options = parser.parse_args()
    unknown = [form for form in options.forms if form not in FORMS]
    if unknown:
        parser.error(f"no form {unknown[0]!r}; known: {', '.join(FORMS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    for form in options.forms or FORMS:
        measure(form, options.folder)
    text = table(options.folder)
    about = (__doc__ or "").partition("\n\n")[2].strip()
    facts = "\n".join(f"- {what}: {value}" for what, value in stamp("python -m tools.bench.decoder").items())
    options.out.write_text(f"# Benchmarks: int8 KV cache\n\n{about}\n\n{text}\n\n{facts}\n")
    print(text)


if __name__ == "__main__":
    main()
