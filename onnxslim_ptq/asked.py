"""What a caller asked for, checked before the model is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calib.blocks.blockwise import Blockwise, needs_blocks
from calib.errors import CalibrationError
from calib.gather import Gathering
from calib.model import Model
from calib.provider import require_device
from calib.saved.progress import Resume
from onnxslim_ptq.core.targets import TARGETS, Target
from onnxslim_ptq.cpu import saturates
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.samples import Samples

__all__ = ["Asked", "checked", "gathering"]

_NAN_POLICIES = ("error", "ignore", "exclude-layer")


@dataclass(frozen=True)
class Asked:
    """The recipe with all patterns, its target, and whether weights are limited to 7 bits."""

    recipe: Recipe
    target: Target
    reduce_range: bool


def checked(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    target: str | None,
    device: str,
    nan: str,
    reduce_range: str,
    include: Sequence[str],
    exclude: Sequence[str],
) -> Asked:
    """Raises RecipeError for what is unknown or not available, DeviceError when the device is not there."""
    loaded = Recipe.load(recipe).with_patterns(include=include, exclude=exclude)
    row = TARGETS.get(target or loaded.target)
    if row is None:
        raise RecipeError(f"target '{target}' is unknown; use one of {', '.join(TARGETS)}")
    if nan not in _NAN_POLICIES:
        raise RecipeError(f"nan: '{nan}' is unknown; use one of {', '.join(_NAN_POLICIES)}")
    require_device(device)
    reduced = {"auto": row.optimizes_here and saturates(), "on": True, "off": False}.get(reduce_range)
    if reduced is None:
        raise RecipeError(f"reduce_range: '{reduce_range}' is unknown; use auto, on or off")
    return Asked(loaded, row, reduced)


def gathering(
    source: Model,
    data: Samples,
    workers: int | None,
    ray: str | None,
    resume: str | Path | Resume | None,
    blockwise: bool = False,
) -> Gathering:
    """How statistics are gathered, block-wise also where memory is short; CalibrationError for less than one worker."""
    if workers is not None and workers < 1:
        raise CalibrationError(f"--workers {workers}: must be at least 1")
    alone = workers is None and ray is None
    blocks = Blockwise() if blockwise or (alone and needs_blocks(source)) else None
    if resume is None:
        return Gathering(workers, ray, blocks)
    kept = resume if isinstance(resume, Resume) else Resume(Path(resume))
    return Gathering(workers, ray, blocks, replace(kept, model=source.sha256, data=data.sha256))
