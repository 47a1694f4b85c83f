"""What a caller asked for, and the check of it before the model is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from calib.progress import Listener
from calib.provider import require_device
from calib.saved.progress import Resume
from calib.saved.store import Statistics
from onnxslim_ptq.core.targets import TARGETS, Target
from onnxslim_ptq.cpu import saturates
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.recipe import Recipe

__all__ = ["Asked", "Checked", "reduced"]

_NAN_POLICIES = ("error", "ignore", "exclude-layer")
_REDUCE_RANGE = ("auto", "on", "off")


@dataclass(frozen=True)
class Asked:
    """The arguments that `quantize`, `calibrate`, `analyze` and `tune` share, as they were given; `quantize` says
    what each means. The command line and the functions make one of these and hand it on."""

    recipe: str | Path | Mapping[str, Any] | Recipe = "w8a8"
    calib_data: Any = None
    target: str | None = None
    device: str = "cpu"
    eval_data: Any = None
    samples: int | None = None
    stacked: bool = False
    hold_out: bool = True
    shapes: Mapping[str, tuple[int, ...]] | None = None
    ranges: Mapping[str, tuple[float, float]] | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    nan: str = "error"
    reduce_range: str = "auto"
    min_sqnr: float = 6.0
    allow_quantized: bool = False
    threads: int = 0
    seed: int = 0
    stats: str | Path | Statistics | None = None
    workers: int | None = None
    ray: str | None = None
    resume: str | Path | Resume | None = None
    blockwise: bool = False
    listener: Listener | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], **more: Any) -> Asked:
        """From the arguments of a function, its ``locals()``, and ``more``; those that are the function's own are
        passed over."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in {**given, **more}.items() if name in known})

    def checked(self) -> Checked:
        """Raises RecipeError for what is unknown or not available, DeviceError when the device is not there."""
        recipe = Recipe.load(self.recipe).with_patterns(include=self.include, exclude=self.exclude)
        target = TARGETS.get(self.target or recipe.target)
        if target is None:
            raise RecipeError(f"target '{self.target}' is unknown; use one of {', '.join(TARGETS)}")
        if target.name != recipe.target:  # what the recipe says has to hold for this target
            recipe = Recipe.load({**recipe.dump(), "target": target.name})
        if self.nan not in _NAN_POLICIES:
            raise RecipeError(f"nan: '{self.nan}' is unknown; use one of {', '.join(_NAN_POLICIES)}")
        require_device(self.device)
        if self.reduce_range not in _REDUCE_RANGE:
            raise RecipeError(f"reduce_range: '{self.reduce_range}' is unknown; use auto, on or off")
        return Checked(recipe, target, reduced(target, self.reduce_range))


@dataclass(frozen=True)
class Checked:
    """The recipe with all patterns, its target, and whether weights are limited to 7 bits."""

    recipe: Recipe
    target: Target
    reduce_range: bool


def reduced(target: Target, option: str) -> bool:
    """Whether weights are limited to 7 bits: ``auto`` asks the processor when it is the target."""
    return option == "on" or (option == "auto" and target.optimizes_here and saturates())
