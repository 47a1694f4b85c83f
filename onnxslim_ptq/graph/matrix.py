"""How a layer's weight reads as matrices [out, in] that multiply rows of its input, and which rows those are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from calib.stats.patch import Patch
from calib.types import Array, Probe
from onnxslim_ptq.core.spec import PerChannel, PerGroup, QParams
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear

__all__ = ["Matrices", "conv_patch", "matrices_of"]

_ROWS = 256.0  # of one sample that a Gram matrix counts


@dataclass(frozen=True)
class Matrices:
    """A weight of ``shape`` as ``groups`` matrices [out / groups, in]; ``swapped``: it is stored as [in, out, ...].

    ``window``: columns per input channel. ``probe``: the Gram matrices of the inputs.
    """

    shape: tuple[int, ...]
    groups: int
    swapped: bool
    window: int
    probe: Probe

    @property
    def inputs(self) -> int:
        """Columns of a matrix."""
        return int(np.prod(self.shape)) // self.shape[1 if self.swapped else 0]

    def split(self, weight: NDArray[Any]) -> NDArray[Any]:
        """The matrices, [groups, out / groups, in]."""
        first = np.moveaxis(weight, 1, 0) if self.swapped else weight
        return first.reshape(self.groups, len(first) // self.groups, -1)

    def join(self, parts: Array) -> Array:
        """The inverse of `split`, contiguous."""
        if not self.swapped:
            return parts.reshape(self.shape)
        first = parts.reshape(self.shape[1], self.shape[0], *self.shape[2:])
        return np.ascontiguousarray(np.moveaxis(first, 0, 1))

    def numbers(self, params: QParams) -> list[QParams]:
        """The weight's numbers as each matrix sees them: PerTensor, PerChannel(0) or PerGroup(1, size)."""
        grain = params.spec.grain
        scale, zero = params.scale, params.zero_point
        if isinstance(grain, PerChannel):
            spec = replace(params.spec, grain=PerChannel(0))
            pairs = zip(np.split(scale, self.groups), np.split(zero, self.groups), strict=True)
            return [QParams(spec, s, z) for s, z in pairs]
        if isinstance(grain, PerGroup):
            spec = replace(params.spec, grain=PerGroup(1, grain.size))
            return [QParams(spec, scale.T, zero.T) if self.swapped else QParams(spec, scale, zero)]
        return [params]

    def joined(self, parts: list[QParams], like: QParams) -> QParams:
        """The inverse of `numbers`."""
        if not isinstance(like.spec.grain, PerChannel | PerGroup):
            return replace(parts[0], spec=like.spec)
        scale = np.concatenate([p.scale for p in parts])
        zero = np.concatenate([p.zero_point for p in parts])
        if isinstance(like.spec.grain, PerGroup) and self.swapped:
            scale, zero = np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T)
        return QParams(like.spec, scale, zero)

    def gram(self, seen: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the probe saw as [groups, in, in]: of a ConvTranspose, whose taps lie side by side, for every tap."""
        grams = seen.reshape(-1, *seen.shape[-2:])
        if self.window > 1 and grams.shape[-1] * self.window == self.inputs:
            return np.kron(grams[0], np.eye(self.window))[None]
        return grams


def matrices_of(graph: Graph, layer: Linear) -> Matrices | str:
    """The layer's matrices, or why its weight has no such form.

    A ConvTranspose counts its taps as if they never met in one output, which is so when its stride is at least its
    kernel.
    """
    node = graph.node(layer.node)
    weight = graph.value(node.inputs[layer.weight])
    assert weight is not None, f"layer {layer.node} lost its weight"
    shape, tensor = tuple(weight.shape), layer.activation_name
    most = ("most", _ROWS)
    window = int(np.prod(shape[2:]))
    if layer.op == "Conv":
        groups = int(node.attrs.get("group", 1))
        options = (("groups", float(groups)), most, *conv_patch(node, shape[2:]).options())
        return Matrices(shape, groups, False, window, Probe(tensor, "gram", None, options))
    if layer.op == "ConvTranspose":
        if int(node.attrs.get("group", 1)) != 1:
            return "a grouped ConvTranspose"
        return Matrices(shape, 1, True, window, Probe(tensor, "gram", 1, (most,)))
    if len(shape) != 2:
        return "a stack of matrices"
    axis = 0 if node.attrs.get("transA", 0) else -1
    swapped = layer.op == "MatMul" or not node.attrs.get("transB", 0)
    return Matrices(shape, 1, swapped, 1, Probe(tensor, "gram", axis, (most,)))


def conv_patch(node: gs.Node, kernel: tuple[int, ...]) -> Patch:
    """The window of a Conv. Where auto_pad leaves the padding to the input's size, it is that of stride 1."""
    ones = (1,) * len(kernel)
    dilations = tuple(int(d) for d in node.attrs.get("dilations", ones))
    strides = tuple(int(s) for s in node.attrs.get("strides", ones))
    pads = tuple(int(p) for p in node.attrs.get("pads", (0,) * 2 * len(kernel)))
    begin, end = pads[: len(kernel)], pads[len(kernel) :]
    if (auto := node.attrs.get("auto_pad", "NOTSET")) in ("SAME_UPPER", "SAME_LOWER"):
        both = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        less, more = tuple(b // 2 for b in both), tuple(b - b // 2 for b in both)
        begin, end = (less, more) if auto == "SAME_UPPER" else (more, less)
    elif auto == "VALID":
        begin = end = (0,) * len(kernel)
    return Patch(tuple(kernel), strides, dilations, begin, end)
