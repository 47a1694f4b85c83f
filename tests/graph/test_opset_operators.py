"""Every common operator, at the opsets that changed it, means the same after its opset was raised."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.model import open_model
from calib.types import Array
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.opset import raise_opset
from tests.graph.models import embedded, feed_for, parse, run

F = "float[2,3,4,4]"
RNG = np.random.default_rng(0)
K = RNG.uniform(0.5, 2, 3).astype(np.float32)
WEIGHTS: dict[str, Array] = {
    "k": K,
    "w": RNG.standard_normal((5, 3, 3, 3), dtype=np.float32),
    "m": RNG.standard_normal((4, 6), dtype=np.float32),
    "s2": np.float32([1, 1, 2, 2]),
    "s15": np.float32([1, 1, 1.5, 2.5]),
    "half": np.float32([1, 1, 0.5, 0.5]),
    "i": np.array([1, 0]),
    "shape": np.array([2, -1]),
    "depth": np.array(4),
    "off_on": np.float32([0, 1]),
    "wt": RNG.standard_normal((3, 2, 3, 3), dtype=np.float32),
    "p1": np.float32(0.25).reshape(1),
    "w_rnn": RNG.standard_normal((1, 20, 4), dtype=np.float32),
    "r_rnn": RNG.standard_normal((1, 20, 5), dtype=np.float32),
    "g": RNG.uniform(-1, 1, (2, 3, 3, 2)).astype(np.float32),
    "one": np.array([1]),
    "k3": np.array([3]),
}
# (opset of the source, node, outputs): what the converter alone gets wrong or refuses is marked in the names.
NODES = [
    (7, "BatchNormalization (x, k, k, k, k)"),
    (7, "Dropout <ratio = 0.5> (x)"),
    (8, "Dropout <ratio = 0.5> (x)"),
    (9, "BatchNormalization (x, k, k, k, k)"),
    (10, "Dropout (x)"),
    (7, "Reshape (x, shape)"),
    (7, "Sum (x, x, x)"),
    (7, "Max (x, y0)"),
    (7, 'Upsample <mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]> (x)'),
    (8, 'Upsample <mode = "linear", scales = [1.0, 1.0, 1.5, 2.5]> (x)'),
    (9, 'Upsample <mode = "nearest"> (x, s2)'),
    (9, 'Upsample <mode = "nearest"> (x, s15)'),
    (9, 'Upsample <mode = "linear"> (x, s15)'),
    (10, 'Resize <mode = "nearest"> (x, s15)'),
    (10, 'Resize <mode = "nearest"> (x, half)'),
    (10, 'Resize <mode = "linear"> (x, s15)'),
    (11, 'Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (x, none, s15)'),
    (7, "Softmax <axis = 1> (x)"),
    (11, "Softmax (x)"),
    (11, "Softmax <axis = 3> (x)"),
    (11, "Softmax <axis = 0> (x)"),
    (11, "Softmax <axis = -2> (x)"),
    (11, "LogSoftmax <axis = 1> (x)"),
    (11, "Hardmax <axis = 1> (x)"),
    (9, 'Pad <mode = "constant", pads = [0,0,1,1,0,0,2,2], value = 1.5> (x)'),
    (9, 'Pad <mode = "reflect", pads = [0,0,1,1,0,0,2,2]> (x)'),
    (9, "Slice <axes = [2, 3], starts = [1, -2], ends = [3, 10000]> (x)"),
    (9, "Slice <starts = [1], ends = [2]> (x)"),
    (9, "Clip <min = -0.5, max = 0.5> (x)"),
    (9, "Clip <max = 0.5> (x)"),
    (9, "Clip <min = 0.1> (x)"),
    (9, "Clip (x)"),
    (9, "Squeeze <axes = [0]> (u)"),
    (11, "Squeeze <axes = [-3]> (u)"),
    (11, "Squeeze (u)"),
    (9, "Unsqueeze <axes = [0, 2]> (x)"),
    (11, "Unsqueeze <axes = [-1]> (x)"),
    (9, "ReduceSum <axes = [1, 2], keepdims = 0> (x)"),
    (11, "ReduceSum (x)"),
    (11, "ReduceMean <axes = [-1]> (x)"),
    (11, "ReduceMax <axes = [2, 3], keepdims = 0> (x)"),
    (11, "ReduceL2 <axes = [1]> (x)"),
    (11, "ReduceMean (x)"),
    (9, "Gemm <alpha = 0.5> (a, m, p1)"),
    (7, "Gemm (a, m, p1)"),
    (11, "Gemm (a, m)"),
    (7, "MatMul (a, m)"),
    (7, "Conv (x, w)"),
    (7, "ConvTranspose <strides = [2, 2]> (x, wt)"),
    (7, "MaxPool <kernel_shape = [2, 2]> (x)"),
    (7, "AveragePool <kernel_shape = [2, 2], pads = [1,1,1,1]> (x)"),
    (10, "AveragePool <kernel_shape = [2, 2], ceil_mode = 1> (x)"),
    (7, "GlobalAveragePool (x)"),
    (7, "LeakyRelu <alpha = 0.1> (x)"),
    (7, "PRelu (x, p1)"),
    (7, "Elu (x)"),
    (7, "HardSigmoid (x)"),
    (7, "InstanceNormalization (x, k, k)"),
    (7, "LRN <size = 3> (x)"),
    (7, "Flatten <axis = 2> (x)"),
    (7, "Concat <axis = 1> (x, x)"),
    (9, "OneHot (i, depth, off_on)"),
    (9, "ConstantOfShape <value = float[1] {2.0}> (i)"),
    (7, "Gather <axis = 1> (x, i)"),
    (9, "Scatter <axis = 0> (a, j, a)"),
    (7, "Tile (a, i2)"),
    (8, "Expand (a, i2)"),
    (9, "Where (b, x, x)"),
    (7, "Cast <to = 7> (x)"),
    (7, "ArgMax <axis = 1> (x)"),
    (11, "ArgMax <axis = -1, keepdims = 0> (x)"),
    (7, "DepthToSpace <blocksize = 2> (d)"),
    (11, "Round (x)"),
    (11, "CumSum (x, depth0)"),
    (9, "Erf (x)"),
    (7, "Pow (x, p1)"),
    (7, "Equal (i, i)"),
    (7, "Div (x, y0)"),
    (7, "Transpose <perm = [0, 2, 3, 1]> (x)"),
    (9, "Shape (x)"),
    (9, "NonZero (x)"),
    (12, 'Einsum <equation = "ij,jk->ik"> (a, m)'),
    (16, 'GridSample <mode = "bilinear"> (x, g)'),
    (17, "LayerNormalization <axis = -1> (x, four)"),
    (7, "Identity (x)"),
    (7, "PRelu (x, slope)"),
    (11, 'DepthToSpace <blocksize = 2, mode = "CRD"> (d)'),
    (10, "Mod (i, i3)"),
    (7, "Selu (x)"),
    (10, "ThresholdedRelu (x)"),
    (10, "IsInf (x)"),
    (11, "Hardmax <axis = 3> (x)"),
    (11, "Hardmax (x)"),
    (11, "Hardmax <axis = -2> (x)"),
    (10, "RoiAlign <output_height = 2, output_width = 2, sampling_ratio = 2> (x, rois, i)"),
    (11, "NonMaxSuppression (boxes, scores, one)"),
    (10, "NonMaxSuppression (boxes, scores, one)"),
    (17, "DFT <axis = 1> (g)"),
    (9, "EyeLike <k = 1> (a)"),
    (11, "ScatterND (a, nd, p1)"),
    (9, "Shrink (x)"),
    (11, "Det (x)"),
    (11, "Clip (x, p0, p0)"),
    (8, "Mean (x, y0)"),
    (7, "Min (x, y0)"),
    (11, "ReduceSumSquare <axes = [1]> (x)"),
    (11, "ReduceLogSumExp <axes = [-1]> (x)"),
    (13, "ReduceMean <axes = [1, -1], keepdims = 0> (x)"),
    (13, "Pad (x, pads)"),
    (13, "LeakyRelu (x)"),
]
EXTRA: dict[str, Array] = {
    "none": np.zeros(0, np.float32),
    "i2": np.array([2, 1]),
    "j": np.array([[1, 0, 1, 0], [0, 1, 0, 1]]),
    "depth0": np.array(2),
    "four": np.ones(4, np.float32),
    "slope": K.reshape(3, 1, 1),
    "i3": np.array([3, 3]),
    "rois": np.float32([[0, 0, 3, 3], [1, 0.5, 2, 3]]),
    "p0": np.float32(0.5),
    "boxes": np.float32([[[0, 0, 1, 1], [0, 0.1, 1, 1.1], [2, 2, 3, 3]]]),
    "scores": np.float32([[[0.9, 0.8, 0.7]]]),
    "one_f": np.float32([1.5]),
    "nd": np.array([[1, 2]]),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
}
INPUTS = {
    "x": F,
    "y0": F,
    "a": "float[2,4]",
    "u": "float[1,3,4]",
    "b": "bool[2,3,4,4]",
    "d": "float[1,8,2,2]",
}
OUTPUT_TYPE = {
    "Cast": "int64",
    "ArgMax": "int64",
    "Shape": "int64",
    "NonZero": "int64",
    "Equal": "bool",
    "Mod": "int64",
    "NonMaxSuppression": "int64",
    "IsInf": "bool",
}


def one_node(opset: int, node: str) -> onnx.ModelProto:
    words = set(node.replace("(", " ").replace(")", " ").replace(",", " ").split())
    inputs = ", ".join(f"{t} {n}" for n, t in INPUTS.items() if n in words)
    if not inputs:
        inputs = "float[1] unread"
    kind = OUTPUT_TYPE.get(node.split()[0], "float")
    proto = parse(f"g ({inputs}) => ({kind} out) {{ [it] out = {node} }}", {}, opset)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    weights = {**WEIGHTS, **EXTRA}
    proto.graph.initializer.extend(
        numpy_helper.from_array(weights[n], n) for n in sorted(words & set(weights))
    )
    return proto


@pytest.mark.parametrize("target", [13, 17, 19, 21])
@pytest.mark.parametrize(("opset", "node"), NODES, ids=[f"{o}-{n}" for o, n in NODES])
def test_operator_means_the_same(opset: int, node: str, target: int) -> None:
    proto = one_node(opset, node)
    shape = run(proto, feed_for(proto))[0].shape
    proto.graph.output[0].type.tensor_type.shape.dim.extend(
        onnx.TensorShapeProto.Dimension(dim_value=d) for d in shape
    )
    raised = raise_opset(open_model(proto), target)
    result = embedded(raised)
    assert Graph(raised).opset == max(target, opset)
    onnx.checker.check_model(result, full_check=True)
    for seed in range(2):
        feed = feed_for(proto, seed)
        for old, new in zip(run(proto, feed), run(result, feed), strict=True):
            assert old.shape == new.shape
            np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
