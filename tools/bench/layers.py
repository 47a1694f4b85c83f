"""`python -m tools.bench layers`: what the layers of a decoder cost its predictions, and what leaving them float gains.

The divergence KL(p || q) = Σ p (log p − log q) of the predicted tokens, p of the float model, q of the quantized one,
in nats, mean over all tokens of some held-out windows. Layers are switched on and off in one session.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from calib.provider import SessionOptions, create_session
from calib.runner import run_session
from calib.types import Sample
from onnxslim_ptq.analysis.switchboard import makers_of
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.export.switches import Switched, switch_layers
from onnxslim_ptq.job import open_job
from onnxslim_ptq.pipeline import make_plan
from tools.zoo import load

from .machine import ROOT, stamp
from .tables import markdown

OUT = ROOT / "docs" / "benchmarks-layers.md"
_STEPS = (1, 2, 4, 8)
_TEXT = """# What the layers of a decoder cost

Written by `python -m tools.bench layers`; do not edit by hand.

SmolLM2-135M with recipe `{recipe}`: divergence of the predicted tokens from the float model's, in 10⁻³ nats, over
{samples} held-out windows of the calibration text: it is about what the loss grows by. `float`: what is left float; the
rest is int8. First all layers of a kind, then, of the kind that costs most, the layers that gain most alone, added up.
"""


def main(arguments: Sequence[str]) -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench layers", description=__doc__)
    parser.add_argument("--recipe", default="w8a8-transformer")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT, help="Markdown file to write")
    options = parser.parse_args(arguments)
    case = load("smollm2")
    job, _ = open_job(case.model, Asked(recipe=options.recipe, calib_data=list(case.calibration)))
    planned = make_plan(job)
    samples = list(job.evaluation)[: options.samples]
    workspace = planned.workspace
    makers = makers_of(workspace.graph, planned.placement)
    rows = _rows(Predictions(switch_layers(workspace.model(), planned.plan, makers), samples))
    text = _TEXT.format(recipe=options.recipe, samples=len(samples))
    marks = stamp(" ".join(["python -m tools.bench layers", *arguments]))
    foot = "\n".join(f"- {key}: {value}" for key, value in marks.items())
    text = f"{text}\n{markdown(['float', 'layers', 'divergence'], rows)}\n{foot}\n"
    options.out.write_text(text, "utf-8")
    print(text)
    return 0


class Predictions:
    """The predicted tokens with any of the layers quantized, and how far they are from those of the float model."""

    def __init__(self, switched: Switched, samples: Sequence[Sample]) -> None:
        self.layers = list(switched.layers)
        self._switched, self._samples = switched, samples
        model = switched.model
        options = SessionOptions(simulate=True)
        self._session = create_session(model.proto.SerializeToString(), model.weights, options=options)
        self._exact = [self._log_softmax(sample, ()) for sample in samples]

    def _log_softmax(self, item: Sample, on: Collection[str]) -> np.ndarray:
        sample, feed = item
        (logits,) = run_session(self._session, ["logits"], {**feed, **self._switched.feed(on)}, sample)
        rows = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
        return rows

    def divergence(self, floats: Collection[str]) -> float:
        """Mean KL(p || q) in nats with ``floats`` left float."""
        on = set(self.layers) - set(floats)
        found = []
        for item, exact in zip(self._samples, self._exact, strict=True):
            found.append((np.exp(exact) * (exact - self._log_softmax(item, on))).sum(axis=-1))
        return float(np.concatenate(found).mean())


def _rows(predictions: Predictions) -> list[list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in predictions.layers:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    rows = [_row(predictions, "nothing", [])]
    costs = {}
    for kind, names in kinds.items():
        rows.append(_row(predictions, f"`{kind}`", names))
        costs[kind] = float(rows[-1][-1])
        print(rows[-1], flush=True)
    worst = kinds[min((k for k in kinds if len(kinds[k]) > 1), key=lambda kind: costs[kind])]
    order = sorted(worst, key=lambda name: predictions.divergence([name]))
    for count in _STEPS:
        shown = (
            f"`{order[0]}`"
            if count == 1
            else f"and `{order[count - 1]}`"
            if count == 2
            else f"the first {count}"
        )
        rows.append(_row(predictions, shown, order[:count]))
    return rows


def _row(predictions: Predictions, name: str, floats: Sequence[str]) -> list[str]:
    return [name, str(len(floats)), f"{1000 * predictions.divergence(floats):.1f}"]
