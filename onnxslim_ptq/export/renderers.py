"""The forms a quantized graph is written in, by the name in a target's row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calib.model import Model, open_model
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.export.ascend import render_ascend
from onnxslim_ptq.export.files import write_model
from onnxslim_ptq.export.lowering import lower_ascend
from onnxslim_ptq.export.qdq import render_qdq
from onnxslim_ptq.export.qoperator import render_qoperator

__all__ = ["RENDERERS", "Renderer"]


@dataclass(frozen=True)
class Renderer:
    """``render`` writes the plan into the float graph; ``lower`` turns the result into what ONNX Runtime can run.

    ``lower`` is None for a form that ONNX Runtime runs as it is.
    """

    render: Callable[[Model, QuantPlan, Target], Model]
    lower: Callable[[Model], Model] | None = None

    def runnable(self, rendered: Model) -> Model:
        """The rendered model, or the same computation in standard operators."""
        return rendered if self.lower is None else self.lower(rendered)

    def twin(self, model: Model, plan: QuantPlan, target: Target) -> Model | None:
        """The plan as QDQ, for a form that is not run as it is: both have to answer alike."""
        return None if self.lower is None else render_qdq(model, plan, target)

    def proof(self, written: Path, folder: Path) -> Path:
        """A file in ``folder`` that can be checked and run in place of ``written``: made from it, or it itself."""
        if self.lower is None:
            return written
        lowered = folder / f"{written.stem}.lowered.onnx"
        write_model(self.lower(open_model(written)), lowered, external=True)
        return lowered


RENDERERS: dict[str, Renderer] = {
    "qdq": Renderer(render_qdq),
    "qoperator": Renderer(render_qoperator),
    "ascend": Renderer(render_ascend, lower_ascend),
}
