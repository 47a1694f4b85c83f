"""`python -m tools.bench calib`: the cost of a calibration sweep beside the plain forward pass and the peer's."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.zoo.case import Case

from .machine import ROOT, stamp
from .spawn import JobError, Limits, default_memory_mb, run_job
from .tables import markdown

SAMPLES = {"rec": 64, "effnet": 64, "minilm": 64, "smollm2": 32}
OUT = ROOT / "docs" / "benchmarks-calib.md"
_ROUNDS = {"smollm2": 3}
_MOST_ROUNDS = 7
_PEERS = ("MinMax", "Percentile")
_PEER_SECONDS = 150.0
_GOALS = {"minmax": 1.2, "histogram": 1.6}
_WARM_UP = 3
_TEXT = """# Cost of a calibration sweep

Written by `python -m tools.bench calib`; do not edit by hand.

A sweep gathers statistics of every activation that a W8A8 plan needs: the inputs of all layers with a constant weight,
and the outputs of convolutions, behind a Relu or Clip that alone reads them. `×` is the time over that of a plain float
pass over the same samples, medians of rounds in which all take turns in one process.

- `forward s`: the plain pass in a session that is open already; `with session`: opening it included.
- `minmax`, `histogram`: `calib.collect`, everything included (planning, opening its session, the statistics), over
  `with session`; in brackets over `forward s`. Goals: minmax ≤ 1.2, histogram ≤ 1.6. A histogram counts about 8192
  elements of a tensor per sample, as the `quantize` step asks for; extremes are taken from all elements.
- `quantize`: the histograms with the channel means that bias correction needs.
- `ORT MinMax`, `ORT Percentile`: the calibrators of `onnxruntime.quantization` on the inputs and outputs of Conv,
  MatMul and Gemm, once, in a process of their own beside a plain pass, over `with session`; peak memory in MB in
  brackets.
"""


def main(arguments: Sequence[str]) -> int:
    """Measure and write the table; 2 when a model cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench calib", description=__doc__)
    parser.add_argument("--models", default=",".join(SAMPLES), help="comma-separated zoo names")
    parser.add_argument("--ours-only", action="store_true", help="without onnxruntime.quantization")
    parser.add_argument("--out", type=Path, default=OUT, help="Markdown file to write")
    options = parser.parse_args(arguments)
    models = options.models.split(",")
    if unknown := [name for name in models if name not in SAMPLES]:
        parser.error(f"--models: no sweep of {unknown[0]!r}; known: {', '.join(SAMPLES)}")
    marks = stamp(" ".join(["python -m tools.bench calib", *arguments]))
    memory = default_memory_mb()
    rows = []
    for name in models:
        try:
            rows.append(_row(name, memory, not options.ours_only))
        except JobError as error:
            print(f"{name}: {error}")
            return 2
        print(rows[-1], flush=True)
    headings = ["model", "samples", "tensors", "forward s", "with session", *_GOALS, "quantize"]
    headings += [] if options.ours_only else [f"ORT {peer}" for peer in _PEERS]
    foot = "\n".join(f"- {key}: {value}" for key, value in marks.items())
    text = f"{_TEXT}\n{markdown(headings, rows)}\n{foot}\n"
    options.out.write_text(text, "utf-8")
    print(text)
    return 0


def _row(name: str, memory: float, peers: bool) -> list[str]:
    found = run_job({"do": "sweeps", "model": name}, Limits(memory, 600))
    opened, plain = found["with session"], found["forward"]
    ours = []
    for kind in ("minmax", "histogram", "quantize"):
        mark = " **missed**" if found[kind] > _GOALS.get(kind, 99.0) * opened else ""
        ours.append(f"{found[kind] / opened:.2f} × ({found[kind] / plain:.2f}){mark}")
    row = [name, str(SAMPLES[name]), str(found["tensors"]), f"{plain:.2f}", f"{opened:.2f}", *ours]
    return row + ([_peer(name, method, memory) for method in _PEERS] if peers else [])


def _peer(name: str, method: str, memory: float) -> str:
    try:
        found = run_job({"do": "calibrator", "model": name, "method": method}, Limits(memory, _PEER_SECONDS))
    except JobError as error:
        return str(error)[:70]
    return f"{found['seconds'] / found['with session']:.2f} × ({found['peak_mb']:.0f})"


def sweeps(case: Case) -> dict[str, Any]:
    """Median seconds of each kind of sweep over the first samples."""
    from calib import Probe, collect
    from calib.model import open_model
    from calib.readers import from_iterable
    from onnxslim_ptq.graph.graph import Graph
    from onnxslim_ptq.graph.opset import raise_opset
    from onnxslim_ptq.graph.optimize import optimize
    from tools.zoo.session import open_session

    feeds = [case.calibration[index] for index in range(SAMPLES[case.name])]
    model = open_model(case.model)
    graph = Graph(raise_opset(model, 13))
    optimize(graph)
    tensors, means = _tensors(graph)
    prepared, data = graph.to_model(), from_iterable(feeds, model.inputs())
    session = open_session(case.model)
    for feed in feeds[:_WARM_UP]:
        session.run(None, feed)

    def forward(run: Any) -> None:
        for feed in feeds:
            run(None, feed)

    minmax = [Probe(name, "minmax") for name in tensors]
    histograms = [Probe(name, "histogram", None, (("most", 8192.0),)) for name in tensors]
    jobs: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(session.run),
        "with session": lambda: forward(open_session(case.model).run),
        "minmax": lambda: collect(prepared, minmax, data),
        "histogram": lambda: collect(prepared, histograms, data),
        "quantize": lambda: collect(prepared, histograms + [Probe(n, "mean", a) for n, a in means], data),
    }
    return {"tensors": len(tensors), **_medians(jobs, _ROUNDS.get(case.name, _MOST_ROUNDS))}


def _tensors(graph: Any) -> tuple[list[str], list[tuple[str, int]]]:
    """Every activation a W8A8 plan quantizes, and the inputs of layers with their channel axis."""
    from onnxslim_ptq.graph.linears import find_linears

    convolutions = ("Conv", "ConvTranspose")
    names, means = [], []
    for layer in find_linears(graph)[0]:
        names.append(layer.activation_name)
        means.append((layer.activation_name, 1 if layer.op in convolutions else -1))
        if layer.op in convolutions:
            output = graph.node(layer.node).outputs[0]
            reader = graph.sole_consumer(output)
            fused = reader is not None and reader.op in ("Relu", "Clip")
            names.append(reader.outputs[0].name if fused else output.name)
    return list(dict.fromkeys(names)), list(dict.fromkeys(means))


def _medians(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def calibrator(case: Case, method: str) -> dict[str, Any]:
    """Seconds and peak memory of one pass of `onnxruntime.quantization`'s calibrator, its ranges included."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    from tools.zoo.session import open_session

    from .peer import Reader, prepare
    from .worker import peak_mb

    feeds = [case.calibration[index] for index in range(SAMPLES[case.name])]
    with tempfile.TemporaryDirectory(prefix="bench-calib-") as folder:
        ready = Path(folder) / "prepared.onnx"
        prepare(case.model, ready)

        def plain() -> None:
            session = open_session(case.model)
            for feed in feeds:
                session.run(None, feed)

        opened = _medians({"with session": plain}, 2)
        start = time.perf_counter()
        made = create_calibrator(
            ready,
            ["Conv", "MatMul", "Gemm"],
            str(Path(folder) / "augmented.onnx"),
            CalibrationMethod[method],
            extra_options={"percentile": 99.99} if method == "Percentile" else {},
        )
        made.collect_data(Reader(feeds))
        made.compute_data()
        return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb(), **opened}
