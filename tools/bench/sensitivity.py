"""`python -m tools.bench sensitivity`: does leaving the worst layers float gain more than chance or habit?

For each model: output SQNR on held-out samples with everything quantized, without the five entries that `analyze
linear` ranks first, without the best of 20 random fives, and without the first two and last three. All are measured
in one session (`Switchboard`), so that nothing but the choice differs. Then the cost, in runs of one sample.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from calib.provider import create_session
from onnxslim_ptq.analysis.entries import Entry, entries_of
from onnxslim_ptq.analysis.metrics import worst_sqnr
from onnxslim_ptq.analysis.ranking import judging_samples, rank_by_sqnr
from onnxslim_ptq.analysis.switchboard import Switchboard
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.job import open_job
from onnxslim_ptq.pipeline import make_plan
from onnxslim_ptq.sensitivity import analyze
from tools.zoo import load

_TOP, _DRAWS = 5, 20


def main(arguments: list[str]) -> int:
    """Print a table; 1 when the ranking does not win somewhere."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench sensitivity", description=__doc__)
    parser.add_argument("--models", default="rec,smollm2")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--held-out", type=int, default=24, help="samples that measure")
    parser.add_argument("--tokens", type=int, help="cut token sequences to this length, to save time")
    options = parser.parse_args(arguments)
    kept = [_one(name, options) for name in options.models.split(",")]
    return 0 if all(kept) else 1


def _one(name: str, options: argparse.Namespace) -> bool:
    case = load(name)
    cut = [_cut(feed, options.tokens) for feed in _spread(case.calibration, options.samples)]
    measured = [_cut(feed, options.tokens) for feed in _spread(case.evaluation, options.held_out)]
    job, data = open_job(case.model, Asked(calib_data=cut, eval_data=measured, reduce_range="off"))
    source = job.source
    session = create_session(source.proto.SerializeToString(), source.weights)
    names = [o.name for o in source.proto.graph.output]
    forward = _seconds(lambda: [session.run(names, dict(feed)) for feed in cut])
    planned = make_plan(job)
    entries = entries_of([layer for layer, _ in planned.placement.layers.values()])
    started = time.perf_counter()
    samples = judging_samples(planned.workspace, len(entries))
    board = Switchboard(planned.workspace, planned.placement, planned.plan, samples)
    place = {ranked.name: index for index, ranked in enumerate(rank_by_sqnr(board, entries))}
    ranking = time.perf_counter() - started
    order = sorted(entries, key=lambda entry: place[entry.name])
    held = Switchboard(planned.workspace, planned.placement, planned.plan, list(data.evaluation))
    rng = np.random.default_rng(0)
    random = [[entries[i] for i in rng.choice(len(entries), _TOP, replace=False)] for _ in range(_DRAWS)]
    results = {
        "everything quantized": _without(held, []),
        "first 5 of analyze": _without(held, order[:_TOP]),
        f"best of {_DRAWS} random 5": max(_without(held, chosen) for chosen in random),
        "first 2 and last 3": _without(held, entries[:2] + entries[-3:]),
    }
    print(f"{name}: {len(entries)} entries, ranked on {len(samples)} samples, measured on {len(measured)}")
    for what, value in results.items():
        print(f"  {what}: {value:.2f} dB")
    spread = _seconds(lambda: analyze(case.model, "linear", "kurtosis", cut))
    print(f"  one pass over {len(cut)} samples: {forward:.1f} s")
    print(
        f"  sqnr: {ranking:.1f} s = {ranking / forward:.1f} passes ({board.runs / len(cut):.1f} by count of runs)"
    )
    print(f"  kurtosis: {spread:.1f} s = {spread / forward:.2f} passes, opening the model included")
    _, ours, *others = results.values()
    return all(ours >= other for other in others)


def _without(board: Switchboard, chosen: list[Entry]) -> float:
    floats = {node for entry in chosen for node in entry.nodes}
    return worst_sqnr(board.outputs(set(board.layers) - floats)) or 0.0


def _spread(feeds: object, count: int) -> list[dict[str, np.ndarray]]:
    return [feeds[int(i)] for i in np.linspace(0, len(feeds) - 1, min(count, len(feeds)))]  # type: ignore[arg-type,index]


def _cut(feed: dict[str, np.ndarray], tokens: int | None) -> dict[str, np.ndarray]:
    return {k: v[:, :tokens] if v.ndim == 2 and v.dtype.kind == "i" else v for k, v in feed.items()}


def _seconds(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started
