"""Shapes through the arithmetic exporters write, with a prime for each dynamic dimension."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from onnxslim_ptq.graph.shapes import Shapes, fixed_shapes, infer_shapes
from tests.graph.models import graph_of


def shapes_of(body: str, opset: int = 17) -> Shapes:
    return infer_shapes(graph_of(body, {"three": np.array([3]), "rest": np.array([-1])}, opset))


def test_dynamic_dimensions_get_primes_of_their_own() -> None:
    found = shapes_of(
        "g (float[B,T,8] x, float[B,2] y, float[?] z) => (float[N] o) { o = Relu (x) }".replace("?", "")
    )
    assert found.known("o") == (11, 13, 8)
    assert found.known("y") == (11, 2)


def test_a_target_computed_from_shapes() -> None:
    found = shapes_of("""g (float[B,T,12] x) => (float[N] o) {
        s = Shape (x)  i = Constant <value_int = 1> ()  n = Gather (s, i)  a = Constant <value_ints = [0]> ()
        u = Unsqueeze (n, a)  f = Shape <end = 1> (x)  t = Concat <axis = 0> (f, u, three, rest)
        o = Reshape (x, t) }""")
    assert found.known("o") == (11, 13, 3, 4)
    assert found.values["t"].tolist() == [11, 13, 3, -1]


def test_lengths_that_only_the_caller_knows_to_be_equal() -> None:
    """A mask of past + present tokens: its last axis stays unknown, the others do not."""
    found = shapes_of(
        "g (float[B,T,P] x, float[B,1,U] m) => (float[N] o) { a = Add (x, m)  o = Softmax (a) }"
    )
    assert found.dims["a"] == (11, 13, None)
    assert found.known("o") is None


@pytest.mark.parametrize("opset", [12, 14, 15, 16])
@pytest.mark.parametrize("op", ["LessOrEqual", "GreaterOrEqual"])
def test_the_causal_mask_of_an_older_opset(op: str, opset: int) -> None:
    """Below opset 16 onnx infers no shape for these, and with that none for anything behind the mask."""
    found = shapes_of(
        f"g (int64[B,1,1,T] k, int64[T,1] q, float[B,4,T,T] x, float[B,4,T,T] z) => (float[N] o) {{ "
        f"m = {op} (k, q)  w = Where (m, x, z)  o = Softmax (w) }}",
        opset,
    )
    assert found.known("m") == (11, 1, 13, 13)
    assert found.kinds["m"] == TensorProto.BOOL
    assert found.known("o") == (11, 4, 13, 13)


def test_a_norm_without_inference_keeps_the_shape() -> None:
    assert shapes_of("g (float[B,4,T] x) => (float[N] o) { o = MeanVarianceNormalization (x) }").known("o") == (
        11, 4, 13
    )  # fmt: skip


def test_what_cannot_be_known() -> None:
    """Shapes that depend on data, operators of other domains and nodes with subgraphs."""
    found = shapes_of("""g (float[B] x) => (float[N] o) {
        i = NonZero (x)  r = Reshape (x, i)  l = local.Strange (x)  o = Relu (l) }""")
    assert found.known("r") is None
    assert "o" not in found.dims


def test_large_results_are_not_computed() -> None:
    """A few bytes of model must not become gigabytes."""
    found = shapes_of("""g (float[B] x) => (int64[N] o) {
        n = Constant <value_ints = [1000000, 1000000]> ()  z = ConstantOfShape (n)  o = Cast <to = 7> (z) }""")
    assert "z" not in found.values
    assert found.known("z") == (1000000, 1000000)


def test_fixed_is_what_no_dynamic_dimension_changes() -> None:
    found = fixed_shapes(
        graph_of(
            "g (float[B,11,8] x) => (float[N] o) { s = Shape (x)  o = Transpose <perm = [1, 0, 2]> (x) }"
        )
    )
    assert found.dims["o"] == (11, None, 8)
    assert "s" not in found.values
