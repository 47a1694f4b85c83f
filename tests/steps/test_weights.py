"""Weight codes, bias correction and int32 biases against formulas in numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from calib.types import Feed
from onnxslim_ptq.core.qmath import dequantize
from onnxslim_ptq.core.spec import QuantPlan, Use
from onnxslim_ptq.steps.fusing import leave_float
from onnxslim_ptq.steps.weights import correct_biases
from onnxslim_ptq.workspace import Workspace
from tests.graph.models import parse, run
from tests.models import feeds_for, mlp, quantized, weights_of
from tests.steps.layers import PLAIN, apply_step, place_all, workspace_of

CORRECTED = replace(PLAIN, bias_correction=True)
LAYERS = {
    "conv": (
        "g (float[N,6,5,5] x) => (float[N,8,5,5] y) { [l] y = Conv (x, w, b) }",
        {"w": (8, 6, 1, 1), "b": (8,)},
    ),
    "conv without bias": (
        "g (float[N,6,5,5] x) => (float[N,8,5,5] y) { [l] y = Conv (x, w) }",
        {"w": (8, 6, 1, 1)},
    ),
    "grouped": (
        "g (float[N,6,5,5] x) => (float[N,8,5,5] y) { [l] y = Conv <group = 2> (x, w, b) }",
        {"w": (8, 3, 1, 1), "b": (8,)},
    ),
    "depthwise": (
        "g (float[N,6,5,5] x) => (float[N,12,3,3] y) { [l] y = Conv <group = 6> (x, w, b) }",
        {"w": (12, 1, 3, 3), "b": (12,)},
    ),
    "strided": (
        "g (float[N,6,5,5] x) => (float[N,8,2,2] y) { [l] y = Conv <strides = [2, 2]> (x, w, b) }",
        {"w": (8, 6, 3, 3), "b": (8,)},
    ),
    "gemm": ("g (float[N,6] x) => (float[N,8] y) { [l] y = Gemm (x, w, b) }", {"w": (6, 8), "b": (8,)}),
    "gemm transB": (
        "g (float[N,6] x) => (float[N,8] y) { [l] y = Gemm <transB = 1> (x, w, b) }",
        {"w": (8, 6), "b": (8,)},
    ),
    "matmul add": (
        "g (float[N,4,6] x) => (float[N,4,8] y) { [l] m = MatMul (x, w) y = Add (m, b) }",
        {"w": (6, 8), "b": (8,)},
    ),
    "add matmul": (
        "g (float[N,6] x) => (float[N,8] y) { [l] m = MatMul (x, w) y = Add (b, m) }",
        {"w": (6, 8), "b": (8,)},
    ),
}


def model(name: str) -> onnx.ModelProto:
    body, shapes = LAYERS[name]
    return parse(body, weights_of(5, **shapes))


def shifted(proto: onnx.ModelProto) -> list[Feed]:
    """Samples whose channels have means far from 0, so that rounded weights shift the outputs.

    Images are constant over space: then the mean of every window is the mean of all positions, as the method assumes.
    """
    offset = np.arange(6, dtype=np.float32)
    feeds: list[Feed] = []
    for feed in feeds_for(proto, 16):
        x = feed["x"]
        x = np.broadcast_to(x[:, :, :1, :1] + offset[:, None, None], x.shape) if x.ndim == 4 else x + offset
        feeds.append({"x": np.ascontiguousarray(x, np.float32)})
    return feeds


def mean_error(
    workspace: Workspace, plan: QuantPlan, exact: onnx.ModelProto, feeds: list[Feed]
) -> np.ndarray:
    """Per channel, the mean difference that rounded weights alone make (activations stay float)."""
    graph = workspace.graph
    for use, slot in plan.weights.items():
        codes = plan.weight_codes[slot.params]
        graph.set_value(graph.node(use.node).inputs[use.port], dequantize(codes.codes, codes.params))
    rounded, axis = graph.to_model(), 1 if len(exact.graph.output[0].type.tensor_type.shape.dim) == 4 else -1
    difference = np.concatenate([run(rounded, f)[0].astype(np.float64) - run(exact, f)[0] for f in feeds])
    return np.moveaxis(difference, axis, 0).reshape(difference.shape[axis], -1).mean(axis=1)


class TestBiasCorrection:
    @pytest.mark.parametrize("name", list(LAYERS))
    def test_takes_the_mean_error_out_of_each_channel(self, name: str) -> None:
        proto = model(name)
        feeds = shifted(proto)
        errors = []
        for choice in (PLAIN, CORRECTED):
            workspace = workspace_of(proto, feeds)
            plan, _ = apply_step(workspace, choice)
            errors.append(np.abs(mean_error(workspace, plan, proto, feeds)))
        assert errors[0].max() > 1e-3, "the test needs an error to correct"
        assert errors[1].max() < 2e-6 + errors[0].max() * 1e-3

    def test_a_matmul_without_a_place_for_it_stays_as_it_is(self) -> None:
        proto = parse("g (float[N,6] x) => (float[N,8] y) { [l] y = MatMul (x, w) }", weights_of(5, w=(6, 8)))
        workspace = workspace_of(proto, shifted(proto))
        plan, _ = apply_step(workspace, CORRECTED)
        assert plan.uncorrected == {}
        assert [n.op for n in workspace.graph.nodes] == ["MatMul"]

    def test_an_add_of_another_shape_stays_as_it_is(self) -> None:
        proto = parse(
            "g (float[N,4,6] x) => (float[N,4,8] y) { [l] m = MatMul (x, w) y = Add (m, b) }",
            weights_of(5, w=(6, 8)) | {"b": np.ones((4, 8), np.float32)},
        )
        workspace = workspace_of(proto, shifted(proto))
        apply_step(workspace, CORRECTED)
        np.testing.assert_array_equal(
            workspace.graph.value(workspace.graph.nodes[1].inputs[1]), np.ones((4, 8))
        )

    def test_a_shared_bias_is_not_shared_afterwards(self) -> None:
        weights = weights_of(5, w=(8, 6, 1, 1), v=(8, 6, 1, 1), b=(8,))
        proto = parse(
            "g (float[N,6,5,5] x) => (float[N,8,5,5] y, float[N,8,5,5] z) "
            "{ [l] y = Conv (x, w, b) [k] z = Conv (x, v, b) }",
            weights,
        )
        workspace = workspace_of(proto, shifted(proto))
        apply_step(workspace, CORRECTED)
        first, second = (workspace.graph.value(workspace.graph.node(n).inputs[2]) for n in "lk")
        assert first is not None
        assert second is not None
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, weights["b"])

    def test_one_value_read_as_image_and_as_rows(self) -> None:
        """A Conv's channels lie on axis 1, a MatMul's on the last: each needs its own means."""
        weights = weights_of(5, w=(8, 6, 1), k=(6, 4), b=(8,), c=(4,))
        proto = parse(
            "g (float[N,6,6] x) => (float[N,8,6] y, float[N,6,4] z) "
            "{ [l] y = Conv (x, w, b) [k] m = MatMul (x, k) z = Add (m, c) }",
            weights,
        )
        rng, slope = np.random.default_rng(0), np.arange(6, dtype=np.float32)
        feeds: list[Feed] = [
            {"x": np.asarray(rng.standard_normal((2, 6, 6)) + slope[:, None] * 2 - slope, np.float32)}
            for _ in range(16)
        ]
        workspace = workspace_of(proto, feeds)
        plan, _ = apply_step(workspace, CORRECTED)
        mean = np.concatenate([f["x"] for f in feeds]).mean(axis=0, dtype=np.float64)
        for node, weight, axis in (("l", weights["w"][:, :, 0], 1), ("k", weights["k"].T, -1)):
            codes = plan.weight_codes[plan.weights[Use(node, 1)].params]
            rounded = dequantize(codes.codes, codes.params).reshape(
                weights["w"].shape if node == "l" else (6, 4)
            )
            error = weight - (rounded[:, :, 0] if node == "l" else rounded.T)
            want = error @ mean.mean(axis=1 if axis == 1 else 0)
            bias = workspace.graph.node("l").inputs[2] if node == "l" else workspace.graph.nodes[2].inputs[1]
            now = workspace.graph.value(bias)
            np.testing.assert_allclose(now - weights["b" if node == "l" else "c"], want, atol=2e-6)

    def test_sizes_that_differ_too(self) -> None:
        weights = weights_of(5, w=(8, 6, 1), k=(5, 4), c=(4,))
        proto = parse(
            "g (float[N,6,5] x) => (float[N,8,5] y, float[N,6,4] z) "
            "{ y = Conv (x, w) m = MatMul (x, k) z = Add (m, c) }",
            weights,
        )
        assert len(quantized(proto).plan.weights) == 2

    def test_nothing_is_done_without_means(self) -> None:
        proto = model("conv")
        workspace = workspace_of(proto, shifted(proto))
        plan, _ = apply_step(workspace)
        assert correct_biases(workspace.graph, plan, [], {}) == 0

    def test_a_layer_that_stays_float_after_all_gets_its_bias_back(self) -> None:
        for name in LAYERS:
            proto = model(name)
            feeds = shifted(proto)
            workspace = workspace_of(proto, feeds)
            placement = place_all(workspace, CORRECTED)
            plan, _ = apply_step(workspace, placement=placement)
            assert list(plan.uncorrected) == ["l"], name
            leave_float(plan, placement, workspace.graph, "l")
            assert (plan.weights, plan.biases, plan.activations) == ({}, {}, {})
            np.testing.assert_array_equal(run(workspace.model(), feeds[0])[0], run(proto, feeds[0])[0])


class TestWeightCodes:
    @pytest.mark.parametrize(("reduce_range", "largest"), [(False, 127), (True, 64)])
    def test_largest_code(self, reduce_range: bool, largest: int) -> None:
        proto = model("conv")
        plan, _ = apply_step(workspace_of(proto, reduce_range=reduce_range))
        (codes,) = plan.weight_codes.values()
        weight = onnx.numpy_helper.to_array(proto.graph.initializer[0])
        assert np.abs(codes.codes.astype(int)).max(axis=(1, 2, 3)).tolist() == [largest] * 8
        np.testing.assert_array_equal(
            codes.params.scale.astype(np.float32),
            (np.abs(weight).max(axis=(1, 2, 3)).astype(np.float64) / largest).astype(np.float32),
        )

    def test_shared_weights_have_one_set_of_codes(self) -> None:
        weights = weights_of(5, w=(8, 8, 1, 1))
        proto = parse(
            "g (float[N,8,5,5] x) => (float[N,8,5,5] y) { [a] h = Conv (x, w) [b] y = Conv (h, w) }", weights
        )
        result = quantized(proto)
        assert len(result.plan.weight_codes) == 1
        stored = [
            t
            for t in result.model.graph.initializer
            if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
        ]
        assert len(stored) == 1


class TestRoom:
    """Biases are int32 with scale s_x * s_w: what does not fit makes s_w larger."""

    BODY = "g (float[N,6,5,5] x) => (float[N,8,5,5] y) { [l] y = Conv (x, w, b) }"

    def _plan(
        self, bias: np.ndarray, weight: np.ndarray | None = None
    ) -> tuple[QuantPlan, dict[str, np.ndarray]]:
        weights = weights_of(5, w=(8, 6, 1, 1)) | {"b": bias.astype(np.float32)}
        if weight is not None:
            weights["w"] = weight.astype(np.float32)
        plan, _ = apply_step(workspace_of(parse(self.BODY, weights)))
        return plan, weights

    def test_a_bias_that_fits_changes_nothing(self) -> None:
        plan, weights = self._plan(np.ones(8))
        (codes,) = plan.weight_codes.values()
        assert plan.notes == []
        assert np.abs(codes.codes).max(axis=(1, 2, 3)).tolist() == [127] * 8
        (bias,) = plan.bias_codes.values()
        np.testing.assert_array_equal(bias.codes, np.rint(weights["b"] / bias.scale))

    def test_a_bias_that_overflows_raises_its_channel_only(self) -> None:
        bias = np.ones(8)
        bias[3] = 1e6
        plan, weights = self._plan(bias)
        (codes,), (stored,) = plan.weight_codes.values(), plan.bias_codes.values()
        assert stored.clipped == 0
        assert np.abs(stored.codes.astype(np.int64)).max() <= 2**30 + 1
        np.testing.assert_allclose((stored.codes * stored.scale - weights["b"]) / stored.scale, 0, atol=0.51)
        largest = np.abs(codes.codes).max(axis=(1, 2, 3)).tolist()
        assert largest[3] < 127
        assert largest[:3] + largest[4:] == [127] * 7
        (activation,) = (plan.params[s.params] for u, s in plan.activations.items() if isinstance(u, Use))
        np.testing.assert_allclose(stored.scale, codes.params.scale * activation.scale, rtol=1e-6)
        assert plan.notes == ["l: 1 weight scales raised so that the bias fits int32"]

    def test_dead_channels(self) -> None:
        """A channel of zeros has any scale: one that tells its bias finely, and its output is exact."""
        weight = weights_of(5, w=(8, 6, 1, 1))["w"]
        weight[[2, 5]] = 0
        bias = np.linspace(-1, 1, 8)
        bias[5] = 0.123456
        plan, weights = self._plan(bias, weight)
        (codes,), (stored,) = plan.weight_codes.values(), plan.bias_codes.values()
        assert not codes.codes[[2, 5]].any()
        alive = np.delete(codes.params.scale, [2, 5])
        np.testing.assert_allclose(codes.params.scale[[2, 5]], np.median(alive), rtol=1e-6)
        np.testing.assert_allclose((stored.codes * stored.scale)[[2, 5]], weights["b"][[2, 5]], atol=1e-4)
        assert plan.notes == [], "no scale was raised for the sake of int32"

    def test_a_layer_of_dead_channels(self) -> None:
        plan, _ = self._plan(np.full(8, 0.5), np.zeros((8, 6, 1, 1)))
        (stored,) = plan.bias_codes.values()
        np.testing.assert_allclose(stored.codes * stored.scale, 0.5, rtol=0.02)

    def test_layers_that_share_a_weight_share_its_room(self) -> None:
        """The second layer's bias must not change the scale that the first layer's bias was made with."""
        weights = weights_of(5, w=(8, 6, 1, 1), b=(8,)) | {"big": np.full(8, 1e6, np.float32)}
        body = """g (float[N,6,5,5] x) => (float[N,8,5,5] y, float[N,8,5,5] z)
            {{ [l] y = Conv (x, w, {}) [k] z = Conv (x, w, {}) }}"""
        for names in (("b", "big"), ("big", "b")):
            plan, _ = apply_step(workspace_of(parse(body.format(*names), weights)))
            (codes,) = plan.weight_codes.values()
            (s_x,) = {
                float(plan.params[s.params].scale) for u, s in plan.activations.items() if isinstance(u, Use)
            }
            for stored in plan.bias_codes.values():
                np.testing.assert_allclose(stored.scale, codes.params.scale * s_x, rtol=1e-6)
                assert stored.clipped == 0
            np.testing.assert_allclose(
                codes.codes * codes.params.scale[:, None, None, None],
                weights["w"],
                atol=codes.params.scale.max() / 2,
            )

    def test_end_to_end(self) -> None:
        """A model whose biases overflow int32 keeps its answers and its integer kernels."""
        weights = weights_of(5, w=(8, 6, 1, 1), v=(4, 8, 1, 1)) | {
            "b": np.linspace(-1e6, 1e6, 8, dtype=np.float32)
        }
        body = "g (float[N,6,5,5] x) => (float[N,4,5,5] y) { [l] h = Conv (x, w, b) [k] y = Conv (h, v) }"
        result = quantized(parse(body, weights))
        assert result.skipped == {}
        assert result.metrics["sqnr_db"] > 35


def test_the_float_model_is_not_touched() -> None:
    proto = mlp()
    before = proto.SerializeToString(deterministic=True)
    quantized(proto)
    assert proto.SerializeToString(deterministic=True) == before
