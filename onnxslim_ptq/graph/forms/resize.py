"""Resizing and pooling in forms that cost less, or that a runtime without Resize has."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_ptq.graph.edit import is_standard
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.shapes import fixed_shapes

__all__ = ["merge_resizes", "pool_before_conv", "resize_as_conv"]

_FIRST = 13
_LARGEST = 16  # a repetition beyond this would make a kernel larger than it is worth


def merge_resizes(graph: Graph) -> int:
    """Two Resizes that repeat every pixel a whole number of times become one that repeats it as often as both.

    Both: mode nearest, asymmetric, floor, constant whole scales; the second alone reads the first. Opset 13 and higher.
    """
    count = 0
    for last in graph.nodes:
        outer = _repeats(graph, last)
        first = graph.producer(last.inputs[0]) if outer is not None else None
        inner = _repeats(graph, first) if first is not None else None
        if outer is None or inner is None or first is None or not graph.reads_alone(last, first.outputs[0]):
            continue
        last.inputs[2] = graph.constant(f"{last.name}.scales", (outer * inner).astype(np.float32))
        source = first.inputs[0]
        graph.remove(first)
        last.inputs[0] = source
        count += 1
    return count


def resize_as_conv(graph: Graph) -> int:
    """A Resize of images that repeats pixels (as in `merge_resizes`) becomes a ConvTranspose per channel with ones.

    Kernel and stride are the repetitions: each input pixel fills its own block, so the values are the same. float32
    images [N, C, H, W] with fixed C, repeated in H and W up to 16 times.
    """
    wanted = [(n, r) for n in graph.nodes if (r := _repeats(graph, n)) is not None]
    if not wanted:
        return 0
    shapes = fixed_shapes(graph)
    count = 0
    for node, repeats in wanted:
        dims = shapes.dims.get(node.inputs[0].name)
        if dims is None or len(dims) != 4 or not isinstance(dims[1], int) or len(repeats) != 4:
            continue
        if (repeats[:2] != 1).any() or repeats.max() > _LARGEST:
            continue
        if shapes.kinds.get(node.inputs[0].name) != TensorProto.FLOAT:
            continue
        size = [int(r) for r in repeats[2:]]
        source, result, name, channels = node.inputs[0], node.outputs[0], node.name, dims[1]
        weight = graph.constant(f"{name}.ones", np.ones((channels, 1, *size), np.float32))
        graph.remove(node)
        attrs = {"group": channels, "kernel_shape": size, "strides": size}
        graph.add_node("ConvTranspose", name, [source, weight], [result], attrs)
        count += 1
    return count


def pool_before_conv(graph: Graph) -> int:
    """GlobalAveragePool(Conv 1x1) becomes Conv 1x1(GlobalAveragePool): both are linear and the Conv sees one pixel.

    The Conv has stride 1, no padding and one group or more; the pooling alone reads it.
    """
    count = 0
    for pool in graph.nodes:
        conv = (
            graph.producer(pool.inputs[0]) if pool.op == "GlobalAveragePool" and is_standard(pool) else None
        )
        if (
            conv is None
            or conv.op != "Conv"
            or not is_standard(conv)
            or not graph.reads_alone(pool, pool.inputs[0])
        ):
            continue
        weight = graph.value(conv.inputs[1])
        pads, strides = conv.attrs.get("pads", [0]), conv.attrs.get("strides", [1])
        plain = conv.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        if weight is None or set(weight.shape[2:]) != {1} or any(pads) or set(strides) != {1} or not plain:
            continue
        source, result, between = conv.inputs[0], pool.outputs[0], graph.variable(f"{pool.name}.before")
        name = pool.name
        graph.remove(pool)
        graph.add_node("GlobalAveragePool", name, [source], [between])
        conv.inputs[0] = between
        conv.outputs[0] = result
        count += 1
    return count


def _repeats(graph: Graph, node: gs.Node) -> NDArray[np.int64] | None:
    """How often a Resize repeats each element along each axis, or None when it does something else."""
    if graph.opset < _FIRST or node.op != "Resize" or not is_standard(node) or len(node.inputs) != 3:
        return None
    attrs = node.attrs
    mode = (attrs.get("mode", "nearest"), attrs.get("coordinate_transformation_mode", "half_pixel"))
    if mode != ("nearest", "asymmetric") or attrs.get("nearest_mode", "round_prefer_floor") != "floor":
        return None
    scales = graph.value(node.inputs[2])
    if scales is None or "axes" in attrs:
        return None
    whole = scales.astype(np.int64)
    return whole if (whole == scales).all() and (whole >= 1).all() else None
