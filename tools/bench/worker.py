"""One job of the benchmark in a process of its own: `python -m tools.bench.worker JOB ANSWER` (see `spawn`).

Heavy modules are imported inside the jobs: what a job does not need is no part of its peak memory. The feeds
are made before any clock starts, in every job alike.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.zoo import Case, load
from tools.zoo.case import Feed
from tools.zoo.session import evaluate, open_session

from . import calib
from .subset import pick

_WARM_UP = 3


def main(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job; any exception becomes {"error": one line}."""
    jobs: dict[str, Callable[..., dict[str, Any]]] = {
        "float": plain,
        "quantize": quantize,
        "measure": measure,
        "latency": latency,
        "sweeps": calib.sweeps,
        "calibrator": calib.calibrator,
    }
    arguments = dict(job)
    try:
        if arguments["do"] == "outliers":
            return _outliers(arguments["model"])
        return jobs[arguments.pop("do")](load(arguments.pop("model")), **arguments)
    except MemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # whatever a tool throws is the result of that tool
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"}


def plain(case: Case) -> dict[str, Any]:
    """The float model: time and peak memory of the forward pass over the calibration samples, then its metrics."""
    feeds = list(case.calibration)
    seconds = forward_s(case.model, feeds)
    shapes = [[list(value.shape) for value in feed.values()] for feed in feeds]
    answer = {"forward_s": seconds, "peak_mb": peak_mb(), "model_mb": model_mb(case.model), "shapes": shapes}
    return {**answer, "metrics": evaluate(case, case.model)}


def forward_s(model: Path, feeds: Sequence[Feed]) -> float:
    """Seconds for one pass over all feeds, after a warm-up; making the session does not count."""
    session = open_session(model)
    for feed in feeds[:_WARM_UP]:
        session.run(None, feed)
    start = time.perf_counter()
    for feed in feeds:
        session.run(None, feed)
    return time.perf_counter() - start


def quantize(
    case: Case,
    tool: str,
    setting: dict[str, Any],
    out: str,
    same_shape: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """Time and peak memory of quantizing and writing, then the plain forward pass over the same samples."""
    feeds = list(case.calibration)
    chosen = pick([[value.shape for value in feed.values()] for feed in feeds], same_shape, limit)
    feeds = [feeds[index] for index in chosen]
    run = _ours(setting) if tool == "ours" else _peer(setting)
    target = Path(out)
    start = time.perf_counter()
    note = run(case.model, target, feeds)
    seconds, peak = time.perf_counter() - start, peak_mb()
    return {
        "quantize_s": seconds,
        "peak_mb": peak,
        "forward_s": forward_s(case.model, feeds),
        "size_mb": model_mb(target),
        "note": note,
    }


def _ours(setting: dict[str, Any]) -> Callable[[Path, Path, list[Feed]], str]:
    import onnxruntime  # noqa: F401  imported late by the tool; imports do not count for either tool

    from onnxslim_ptq import quantize as run_quantize

    def run(model: Path, out: Path, feeds: list[Feed]) -> str:
        run_quantize(model, setting["recipe"], feeds, **setting["options"]).save(out)
        return ""

    return run


def _peer(setting: dict[str, Any]) -> Callable[[Path, Path, list[Feed]], str]:
    from .peer import quantize_static

    def run(model: Path, out: Path, feeds: list[Feed]) -> str:
        return quantize_static(model, out, feeds, **setting)

    return run


def measure(case: Case, file: str) -> dict[str, Any]:
    """Task metrics of a quantized file and its worst-output SQNR over all evaluation samples; where every prediction
    has a loss, what it grew by, and the standard error of that mean over the pairs."""
    from .error import Noise, Paired

    exact, other = open_session(case.model, threads=1), open_session(Path(file), threads=1)
    noise, paired = Noise([output.name for output in exact.get_outputs()]), Paired()

    def outputs() -> Iterable[Any]:
        with ThreadPoolExecutor(1) as beside:
            for index, feed in enumerate(case.evaluation):
                future = beside.submit(exact.run, None, feed)
                z = other.run(None, feed)
                y = future.result()
                noise.add(y, z)
                if case.losses:
                    paired.add(case.losses(index, z) - case.losses(index, y))
                yield z

    metrics = case.score(outputs())
    return {"metrics": metrics | paired.metrics(), "sqnr": noise.worst()}


def _outliers(model: str) -> dict[str, Any]:
    """Recipe -> SQNR on the untouched model and on the one with outlier channels."""
    from .outliers import compare_recipes, llama_block, llama_feeds

    if model == "llama-block":
        return {"sqnr": compare_recipes(llama_block(), llama_feeds(32), llama_feeds(8, seed=9))}
    case = load(model)
    return {"sqnr": compare_recipes(case.model, list(case.calibration), list(case.evaluation))}


def latency(case: Case, files: Sequence[str], rounds: int) -> dict[str, Any]:
    """Median milliseconds of the float model and of every file, taking turns in every round."""
    from .timing import medians_ms

    sessions = [open_session(Path(file), threads=2) for file in (case.model, *files)]
    return {"ms": medians_ms(sessions, case.latency_feed, rounds)}


def peak_mb() -> float:
    """Peak resident memory of this process in MB.

    Linux hands the parent's peak down in `ru_maxrss` when a process starts; VmHWM is only our own.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def model_mb(model: Path) -> float:
    """Size of a model file with its external data."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    proto = onnx.load(str(model), load_external_data=False)
    names = {ExternalDataInfo(t).location for t in proto.graph.initializer if uses_external_data(t)}
    return sum(file.stat().st_size for file in (model, *(model.parent / name for name in names))) / 1e6


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(sys.argv[1]))), "utf-8")
