"""The job: what was asked for, checked, with the model and the samples open."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from calib.blocks.blockwise import Blockwise, needs_blocks
from calib.blocks.spool import Spool
from calib.errors import CalibrationError
from calib.gathering import Gathering
from calib.model import Model, open_model
from calib.progress import Listener
from calib.saved.progress import Resume
from calib.saved.store import Statistics
from calib.types import Dataset
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.core.targets import Target
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.recorded import recorded_samples
from onnxslim_ptq.samples import Samples, open_samples
from onnxslim_ptq.workspace import Workspace

__all__ = ["Job", "gathering", "open_job", "samples_of"]


@dataclass(frozen=True)
class Job:
    """Everything the main job needs; data sets are already open and split. Those from ``gathering``
    on are the `Workspace`'s."""

    source: Model
    recipe: Recipe
    target: Target
    calibration: Dataset
    evaluation: Dataset
    device: str = "cpu"
    threads: int = 0
    nan: str = "error"
    reduce_range: bool = False
    allow_quantized: bool = False
    min_sqnr: float = 6.0
    listener: Listener | None = None
    gathering: Gathering = field(default_factory=Gathering)
    spool: Spool | None = None
    recorded: Statistics | None = None
    record: Statistics | None = None
    synthetic: bool = False

    def workspace(self, graph: Graph) -> Workspace:
        """What the steps work with, on ``graph``."""
        return Workspace(
            graph,
            self.target,
            self.calibration,
            self.device,
            self.threads,
            self.reduce_range,
            self.listener,
            gathering=self.gathering,
            recorded=self.recorded,
            record=self.record,
            spool=self.spool,
            synthetic=self.synthetic,
        )


def open_job(model: str | Path | onnx.ModelProto, asked: Asked) -> tuple[Job, Samples]:
    """Check what was asked for, open the model and the samples; nothing runs.

    Raises RecipeError, DeviceError, GraphError and CalibrationError.
    """
    checked = asked.checked()
    source = open_model(model)
    data = samples_of(source, checked.recipe, asked)
    job = Job(
        source,
        checked.recipe,
        checked.target,
        data.calibration,
        data.evaluation,
        asked.device if data.recorded is None else data.recorded.conditions.device,
        asked.threads,
        asked.nan,
        checked.reduce_range,
        asked.allow_quantized,
        asked.min_sqnr,
        asked.listener,
        recorded=data.recorded,
        synthetic=data.synthetic,
    )
    return job, data


def samples_of(source: Model, recipe: Recipe, asked: Asked) -> Samples:
    """The samples that were asked for: those of saved statistics, or those of the data."""
    return (open_samples if asked.stats is None else recorded_samples)(source, recipe, asked)


def gathering(source: Model, data: Samples, asked: Asked) -> Gathering:
    """How statistics are gathered, block-wise also where memory is short; CalibrationError for less than one worker."""
    if asked.workers is not None and asked.workers < 1:
        raise CalibrationError(f"--workers {asked.workers}: must be at least 1")
    alone = asked.workers is None and asked.ray is None
    blocks = Blockwise() if asked.blockwise or (alone and needs_blocks(source)) else None
    resume = asked.resume
    if resume is not None:
        kept = resume if isinstance(resume, Resume) else Resume(Path(resume))
        resume = replace(kept, model=source.sha256, data=data.sha256)
    return Gathering(asked.workers, asked.ray, blocks, resume)
