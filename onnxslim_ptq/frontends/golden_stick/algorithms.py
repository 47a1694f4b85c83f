"""What goes into ``PTQConfig.algo_args``: options of GPTQ, AWQ and SmoothQuant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["AWQConfig", "GPTQQuantConfig", "SmoothQuantConfig"]


def _require(owner: object, name: str, kind: type, value: object) -> None:
    """TypeError unless ``value`` is of that very type: 1 is no float, and True no int."""
    if type(value) is not kind:
        raise TypeError(
            f"{type(owner).__name__}.{name}: expected {kind.__name__}, got {value!r} ({type(value).__name__})"
        )


@dataclass
class GPTQQuantConfig:
    """GPTQ: columns per block, columns by falling importance, damping as a share of the mean diagonal, group scales
    before rounding starts.

    TypeError for a wrong type, ValueError for a negative ``block_size`` or a ``damp_percent`` outside [0, 1].
    """

    block_size: int = 128
    desc_act: bool = False
    damp_percent: float = 0.01
    static_groups: bool = False

    def __post_init__(self) -> None:
        _require(self, "block_size", int, self.block_size)
        _require(self, "desc_act", bool, self.desc_act)
        _require(self, "damp_percent", float, self.damp_percent)
        _require(self, "static_groups", bool, self.static_groups)
        if self.block_size < 0:
            raise ValueError(f"GPTQQuantConfig.block_size: expected 0 or more, got {self.block_size}")
        if not 0 <= self.damp_percent <= 1:
            raise ValueError(f"GPTQQuantConfig.damp_percent: expected 0 to 1, got {self.damp_percent}")


@dataclass
class AWQConfig:
    """AWQ: whether weights count in the scale; exponents and clip ratios, one fixed or a list to search.

    TypeError for a wrong type, ValueError for a value outside [0, 1].
    """

    duo_scaling: bool = True
    smooth_alpha: float | list[float] = field(default_factory=lambda: [i / 20 for i in range(20)])
    weight_clip_ratio: float | list[float] = field(default_factory=lambda: [1 - i / 20 for i in range(10)])

    def __post_init__(self) -> None:
        _require(self, "duo_scaling", bool, self.duo_scaling)
        for name in ("smooth_alpha", "weight_clip_ratio"):
            values: object = getattr(self, name)
            if type(values) not in (float, list):
                raise TypeError(f"AWQConfig.{name}: expected a float or a list of floats, got {values!r}")
            listed: Sequence[object] = values if isinstance(values, list) else [values]
            for value in listed:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise TypeError(f"AWQConfig.{name}: expected floats, got {value!r}")
                if not 0 <= value <= 1:
                    raise ValueError(f"AWQConfig.{name}: expected values from 0 to 1, got {value}")


@dataclass
class SmoothQuantConfig:
    """SmoothQuant's strength; TypeError unless a float (its range is checked when it is used)."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _require(self, "alpha", float, self.alpha)
