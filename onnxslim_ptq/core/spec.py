"""The plan: where a value is quantized (Site), how (QuantSpec), with which numbers (QParams)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calib.types import Array, Range
from onnxslim_ptq.core.cache import CacheChange
from onnxslim_ptq.core.dtypes import IntType

__all__ = [
    "TIMESTEP",
    "BelowTimestep",
    "BiasCodes",
    "Grain",
    "ManyTokens",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QParams",
    "QuantPlan",
    "QuantSpec",
    "Result",
    "Site",
    "Slot",
    "Use",
    "WeightCodes",
]


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of ``axis``."""

    axis: int


@dataclass(frozen=True)
class PerGroup:
    """One scale per block of ``size`` neighbours along ``axis``, for every index of the other axes (the last block may
    be shorter): the scale has the value's shape with that axis divided, as blocked DequantizeLinear takes it."""

    axis: int
    size: int


@dataclass(frozen=True)
class BelowTimestep:
    """Numbers are found at run time while the graph input ``timestep_idx`` is below ``threshold``; from it on those of
    the highest calibrated step that was reached serve (``QuantPlan.timesteps``)."""

    threshold: int


@dataclass(frozen=True)
class ManyTokens:
    """Numbers are found at run time while there are several tokens: not in a decoder's steps of one token."""


@dataclass(frozen=True)
class PerToken:
    """One scale per row along the last axis, found at run time; with ``while_`` only then, else one known scale.

    Without ``while_`` the plan holds no numbers for it.
    """

    while_: BelowTimestep | ManyTokens | None = None


TIMESTEP = "timestep_idx"
"""The scalar int64 graph input, and the tag of a sample, that `BelowTimestep` looks at."""

Grain = PerTensor | PerChannel | PerGroup | PerToken


@dataclass(frozen=True)
class Use:
    """Input ``port`` of node ``node``: only this reader sees the quantized value."""

    node: str
    port: int


@dataclass(frozen=True)
class Result:
    """The value ``tensor`` where it is produced: every reader sees it quantized."""

    tensor: str


Site = Use | Result


@dataclass(frozen=True)
class QuantSpec:
    """How a value is quantized: real = (code - zero_point) * scale, code an integer of ``dtype``.

    ``full_range``: a symmetric scale spreads the magnitude over all codes, amax / 127.5 for int8, in place of
    amax / 127; +amax is then clipped by half a step.
    """

    dtype: IntType
    grain: Grain
    symmetric: bool
    full_range: bool = False


@dataclass(frozen=True)
class QParams:
    """Scale (float64) and zero point (int64): 0-d for PerTensor, [channels] for PerChannel, blocks for PerGroup."""

    spec: QuantSpec
    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]

    @property
    def axis(self) -> int | None:
        return self.spec.grain.axis if isinstance(self.spec.grain, PerChannel | PerGroup) else None

    @property
    def block(self) -> int | None:
        """The block size of PerGroup."""
        return self.spec.grain.size if isinstance(self.spec.grain, PerGroup) else None

    def range(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The real values of the lowest and highest code."""
        dtype = self.spec.dtype
        return (dtype.lowest - self.zero_point) * self.scale, (dtype.highest - self.zero_point) * self.scale


@dataclass(frozen=True)
class Slot:
    """A quantized site: its spec and the id of its numbers in ``QuantPlan.params`` (readers of one tensor share it).

    A PerToken slot without a condition has no numbers there; its id only tells readers of one tensor that they share
    the work."""

    spec: QuantSpec
    params: str


@dataclass(frozen=True)
class WeightCodes:
    """The integer codes of initializer ``name``, same shape as the float weight, and the rounder that chose them.

    ``error``: the relative squared error of the layer's output with nearest codes and with these, where known.
    """

    codes: Array
    params: QParams
    rounder: str
    name: str = ""
    quantized_name: str = ""
    error: tuple[float, float] | None = None


@dataclass(frozen=True)
class BiasCodes:
    """int32 codes of a bias, shape [channels]; scale = activation scale * weight scale; ``clipped`` codes hit int32."""

    codes: NDArray[np.int32]
    scale: NDArray[np.float64]
    activation: str
    weight: str
    clipped: int
    name: str = ""


@dataclass
class QuantPlan:
    """Everything an exporter needs beside the float graph.

    ``activations`` maps sites to slots; ``weights`` and ``biases`` map (node, port) to slots whose codes are in
    ``weight_codes`` and ``bias_codes`` under the slot's params id; ``skipped`` tells why a node stays float.
    ``uncorrected`` keeps, for each layer whose bias was corrected, (node, port, values) of the bias before: a layer
    that stays float after all must get it back. ``io``: graph inputs and outputs that change their type.
    ``attention`` names the params ids of queries, keys and values that are quantized per head (``<attention>.fa_q``),
    and how many heads they have. ``timesteps``: for a params id that depends on the time step, its numbers at
    each calibrated one; ``params`` holds those at the threshold.
    """

    activations: dict[Site, Slot] = field(default_factory=dict)
    weights: dict[Use, Slot] = field(default_factory=dict)
    biases: dict[Use, Slot] = field(default_factory=dict)
    params: dict[str, QParams] = field(default_factory=dict)
    ranges: dict[str, tuple[Range, str]] = field(default_factory=dict)
    weight_codes: dict[str, WeightCodes] = field(default_factory=dict)
    bias_codes: dict[str, BiasCodes] = field(default_factory=dict)
    uncorrected: dict[str, tuple[str, int, Array]] = field(default_factory=dict)
    attention: dict[str, tuple[str, int]] = field(default_factory=dict)
    timesteps: dict[str, dict[int, QParams]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    io: list[CacheChange] = field(default_factory=list)

    def quantized_nodes(self) -> list[str]:
        return list(dict.fromkeys(use.node for use in self.weights))
