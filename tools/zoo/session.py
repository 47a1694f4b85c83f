"""Running ONNX files with onnxruntime, quietly, its errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cache import need
from .case import Case, Outputs


def open_session(model: Path, threads: int = 0, *, optimize: bool = True) -> Any:
    """A CPU session without warnings (shipped files hold unused initializers); 0 threads: all cores."""
    need("onnxruntime", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def evaluate(case: Case, model: Path, threads: int = 0) -> dict[str, float]:
    """The case's metrics for a model file; a file that does not load or run is a ValueError of one line."""
    try:
        session = open_session(model, threads)
        return case.score(_outputs(session, case))
    except Exception as error:  # onnxruntime has a class of its own for each kind of trouble, without a base
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise ValueError(f"{model}: onnxruntime: {str(error).splitlines()[0]}") from error


def _outputs(session: Any, case: Case) -> Iterator[Outputs]:
    for feed in case.evaluation:
        yield session.run(None, feed)
