"""Models brought down to opset 17 answer as before."""

from __future__ import annotations

import numpy as np
import pytest

from calib.errors import GraphError
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.lower_opset import with_opset
from tests.graph.models import model_of, same_outputs
from tests.models import weights_of

AXES = {"axes": np.asarray([1], np.int64), "pads": np.asarray([0, 1, 0, 2], np.int64)}
SIZES = {"sizes": np.asarray([1, 3, 8, 8], np.int64)}
BODIES = {
    "gelu": "g (float[3,4] x) => (float[3,4] y) { y = Gelu (x) }",
    "gelu tanh": 'g (float[3,4] x) => (float[3,4] y) { y = Gelu <approximate = "tanh"> (x) }',
    "mish": "g (float[3,4] x) => (float[3,4] y) { y = Mish (x) }",
    "reduce": "g (float[3,4] x) => (float[3,1] y) { y = ReduceMean (x, axes) }",
    "reduce all": "g (float[3,4] x) => (float[1,1] y) { y = ReduceMax (x) }",
    "reduce without axis": "g (float[3,4] x) => (float[3] y) { y = ReduceL2 <keepdims = 0> (x, axes) }",
    "split": "g (float[3,4] x) => (float[3,2] a, float[3,2] b) { a, b = Split <axis = 1, num_outputs = 2> (x) }",
    "plain window": """g (float[1,3,4,4] x) => (float[1,3,3,3] y) {
        y = AveragePool <kernel_shape = [2, 2], dilations = [1, 1]> (x)
    }""",
    "pad": "g (float[3,4] x) => (float[3,7] y) { y = Pad (x, pads) }",
    "resize": 'g (float[1,3,4,4] x) => (float[1,3,8,8] y) { y = Resize <mode = "linear"> (x, , , sizes) }',
    "plain norm": """g (float[1,3,4,4] x) => (float[1,3,3,3] y) {
        y = LpPool <kernel_shape = [2, 2], dilations = [1, 1], ceil_mode = 0> (x)
    }""",
    "no float8": "g (float[3,4] x) => (int32[3,4] y) { y = Cast <to = 6, saturate = 1> (x) }",
    "no axes are all": "g (float[3,4] x) => (float[1,1] y) { y = ReduceMean (x, none) }",
    "types only": "g (float[3,4] x) => (float[12] y) { z = Reshape (x, flat) y = Identity (z) }",
}
IMAGE = "(float[1,3,16,16] x) => (float[N,C,H,W] y) {"
CONSTANTS = AXES | SIZES | {"flat": np.asarray([12], np.int64), "none": np.asarray([], np.int64)}


@pytest.mark.parametrize(
    ("body", "opset"),
    [
        pytest.param(b, v, id=f"{n} {v}")
        for n, b in BODIES.items()
        for v in (18, 20)
        if v == 20 or not ("Gelu" in b or "dilations" in b or "saturate" in b)
    ],
)
def test_same_function(body: str, opset: int) -> None:
    used = {k: v for k, v in CONSTANTS.items() if k in body}
    model = model_of(body, used, opset)
    lowered = with_opset(model, 17)
    assert Graph(lowered).opset == 17
    same_outputs(model, lowered)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (
            "(float[3,N] x) => (float[3,M] a, float[3,M] b) { [s] a, b = Split <axis = 1, num_outputs = 2> (x) }",
            "sizes",
        ),
        ('(float[3,4] x) => (float[3,7] y) { [s] y = Pad <mode = "wrap"> (x, pads) }', "wrap"),
        (IMAGE + ' [s] y = Resize <mode = "linear", antialias = 1> (x, , , sizes) }', "'antialias'"),
        (IMAGE + ' [s] y = Resize <mode = "linear", axes = [1]> (x, , , one8) }', "'axes'"),
        (
            IMAGE
            + ' [s] y = Resize <coordinate_transformation_mode = "half_pixel_symmetric"> (x, , , sizes) }',
            "half_pixel_symmetric",
        ),
        (IMAGE + " [s] y = AveragePool <kernel_shape = [2, 2], dilations = [2, 2]> (x) }", "'dilations'"),
        (
            '(float[2,4] x) => (float[2,4] y) { [s] y = ScatterND <reduction = "max"> (x, axes2, rows) }',
            "reduction max",
        ),
        (
            "(float[2,4,3] x) => (float[2,4,3] y) { [s] y = GroupNormalization <num_groups = 2> (x, one, one) }",
            "opset 17",
        ),
    ],
)
def test_what_has_no_form_is_named(body: str, what: str) -> None:
    scattered = {"axes2": np.asarray([[1]], np.int64), "rows": np.ones((1, 4), np.float32)}
    constants = {**CONSTANTS, **scattered, "one": np.ones(2, np.float32), "one8": np.asarray([8], np.int64)}
    with pytest.raises(GraphError, match=rf"node 's': .*{what}"):
        with_opset(model_of(f"g {body}", {k: v for k, v in constants.items() if k in body}, 19), 17)


def test_upwards_is_the_converter() -> None:
    model = model_of("g (float[3,4] x) => (float[3,4] y) { y = Add (x, w) }", weights_of(1, w=(4,)), 11)
    assert Graph(with_opset(model, 17)).opset == 17
    assert with_opset(with_opset(model, 17), 17).proto.opset_import[0].version == 17


def test_the_error_names_the_opset_that_was_asked_for() -> None:
    model = model_of(f"g {IMAGE} y = Resize <antialias = 1> (x, , , sizes) }}", {"sizes": SIZES["sizes"]}, 19)
    with pytest.raises(GraphError, match=r"no form at opset 16, it uses 'antialias'; .* with opset 16"):
        with_opset(model, 16)
