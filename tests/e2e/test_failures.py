"""What users of ONNX quantizers ran into, one class per kind of failure: models that broke, answers that were wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calib.errors import CalibrationError, GraphError
from calib.types import Feed
from onnxslim_ptq import quantize
from onnxslim_ptq.core.spec import Use
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.recipe import RANGE_TYPES
from tests.models import cnn, feeds_for, mlp, outputs_of, parse, quantized, session_of, sqnr_of, weights_of


def recipe_of(range_type: str) -> dict[str, Any]:
    return {"steps": [{"type": "quantize", "act": {"range": {"type": range_type}}}]}


class TestExternalDataAndLargeModels:
    """Above 2 GB tools serialized the model, moved the caller's tensors out of it, or loaded everything."""

    def test_the_callers_proto_is_not_touched(self) -> None:
        proto = cnn()
        before = proto.SerializeToString(deterministic=True)
        result = quantized(proto)
        assert proto.SerializeToString(deterministic=True) == before
        assert result.model is not proto
        result.model.graph.node[0].name = "changed"
        assert result.model.graph.node[0].name != "changed", "each call gives a model of its own"

    def test_weights_in_a_file_beside(self, tmp_path: Path) -> None:
        onnx.save(mlp(), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
        stamps = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        result = quantize(tmp_path / "m.onnx", calib_data=feeds_for(mlp()))
        assert result.source.weights.keys() == {"w1", "w2"}, "large weights stay on disk"
        assert all(not w.flags.owndata and not w.flags.writeable for w in result.source.weights.values())
        paths = result.save(tmp_path / "out" / "q.onnx")
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == stamps
        inside = quantized(mlp()).save(tmp_path / "inside" / "q.onnx")
        assert paths.model.read_bytes() == inside.model.read_bytes(), (
            "where weights were stored does not matter"
        )

    def test_the_working_folder_does_not_matter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        onnx.save(mlp(), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        quantize("../m.onnx", calib_data=feeds_for(mlp())).save("q.onnx")
        assert sorted(p.name for p in Path().iterdir()) == ["q.json", "q.onnx"], "no other files are left"

    def test_large_weights_are_never_serialized(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sessions get skeletons: no message that is made contains the weights."""
        width = 600
        proto = parse(
            f"g (float[N,{width}] x) => (float[N,{width}] y) {{ h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }}",
            weights_of(1, w=(width, width), v=(width, width)),
        )
        sizes: list[int] = []
        session = ort.InferenceSession.__init__

        def watched(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
            sizes.append(len(model) if isinstance(model, bytes) else 0)
            session(self, model, *args, **kwargs)

        monkeypatch.setattr(ort.InferenceSession, "__init__", watched)
        quantized(proto)
        assert len(sizes) > 4
        assert max(sizes) < 50_000, "a weight has 1.4 MB as float and 360 kB as int8"

    def test_constant_nodes_are_weights_too(self) -> None:
        proto = mlp()
        constants = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
        del proto.graph.initializer[:]
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in proto.graph.node]
        del proto.graph.node[:]
        proto.graph.node.extend([*constants, *nodes])
        assert quantized(proto).plan.quantized_nodes() == ["mm1", "mm2", "mm3"]

    def test_large_weights_that_nothing_reads(self) -> None:
        """Real exports carry them; ONNX Runtime drops them and then misses the shared data."""
        proto = mlp()
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros((64, 64), np.float32), "unused"))
        result = quantized(proto)
        assert "unused" not in {t.name for t in result.model.graph.initializer}

    @pytest.mark.slow
    def test_above_two_gigabytes(self, tmp_path: Path) -> None:
        width, count = 8192, 9  # 9 x 268 MB
        shape = (width, width)
        weights = [TensorProto(name=f"w{i}", dims=shape, data_type=TensorProto.FLOAT) for i in range(count)]
        rng = np.random.default_rng(0)
        block = (rng.standard_normal((width // 8, width)) / np.sqrt(width)).astype(np.float32)
        with (tmp_path / "m.bin").open("wb") as file:
            for i, tensor in enumerate(weights):
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (
                    ("location", "m.bin"),
                    ("offset", file.tell()),
                    ("length", width * width * 4),
                ):
                    tensor.external_data.add(key=key, value=str(value))
                for part in range(8):
                    file.write(np.roll(block, i + part, axis=1).tobytes())
        nodes = [
            helper.make_node(
                "MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}" if i < count - 1 else "y"]
            )
            for i in range(count)
        ]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", 1, ["n", width])],
            [helper.make_tensor_value_info("y", 1, ["n", width])],
            weights,
        )
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
            tmp_path / "m.onnx",
        )
        feeds = [{"x": rng.standard_normal((2, width)).astype(np.float32)} for _ in range(2)]
        paths = quantize(tmp_path / "m.onnx", recipe="w8a8-minmax", calib_data=feeds).save(
            tmp_path / "q.onnx"
        )
        onnx.checker.check_model(paths.model)
        session = ort.InferenceSession(paths.model, providers=["CPUExecutionProvider"])
        assert session.run(None, feeds[0])[0].shape == (2, width)


class TestSaturation:
    """Processors without VNNI add two u8 x s8 products in 16 bits: codes up to 127 overflow there."""

    def test_codes_within_64(self) -> None:
        for make in (cnn, mlp):
            result = quantized(make(), reduce_range="on")
            for codes in result.plan.weight_codes.values():
                assert int(np.abs(codes.codes.astype(int)).max()) == 64
            assert result.metrics["sqnr_db"] > 35

    def test_no_pair_of_products_saturates(self) -> None:
        """The worst pair of neighbours along the sum, at the largest activation code, in int16."""
        result = quantized(mlp(), reduce_range="on")
        for codes in result.plan.weight_codes.values():
            pairs = np.abs(codes.codes.astype(int)[:-1] + codes.codes.astype(int)[1:]).max()
            assert 255 * int(pairs) <= 2**15
        assert (
            max(
                255 * int(np.abs(c.codes.astype(int)[:-1] + c.codes.astype(int)[1:]).max())
                for c in quantized(mlp(), reduce_range="off").plan.weight_codes.values()
            )
            > 2**15
        )

    def test_automatic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`auto` asks the processor, and only when that is what the model will run on."""
        from onnxslim_ptq import asked

        monkeypatch.setattr(asked, "saturates", lambda: True)
        largest = {
            t: max(
                int(np.abs(c.codes.astype(int)).max())
                for c in quantized(mlp(), target=t).plan.weight_codes.values()
            )
            for t in ("cpu", "generic", "tensorrt")
        }
        assert largest == {"cpu": 64, "generic": 127, "tensorrt": 127}


class TestRaggedShapes:
    """Percentile and entropy calibrators failed on samples of different sizes; others on empty tensors."""

    @pytest.mark.parametrize("range_type", RANGE_TYPES)
    def test_every_sample_another_size(self, range_type: str) -> None:
        rng = np.random.default_rng(0)
        feeds: list[Feed] = [
            {"x": rng.standard_normal((int(n), 3, int(h), int(w))).astype(np.float32)}
            for n, h, w in rng.integers([1, 4, 4], [4, 12, 12], (16, 3))
        ]
        proto = cnn()
        result = quantized(proto, feeds, recipe=recipe_of(range_type))
        assert result.metrics["sqnr_db"] > 20
        assert result.model.graph.input[0] == proto.graph.input[0], "dynamic dimensions stay dynamic"
        for shape in ((1, 3, 5, 7), (5, 3, 16, 4)):
            x = rng.standard_normal(shape).astype(np.float32)
            assert session_of(result.model).run(None, {"x": x})[0].shape == (shape[0], 5)

    @pytest.mark.parametrize("range_type", RANGE_TYPES)
    def test_samples_without_rows(self, range_type: str) -> None:
        feeds = feeds_for(mlp())
        for i in (0, 3, 7):  # among them the first sample and one that is held out
            feeds[i] = {"x": np.asarray(feeds[i]["x"])[:0]}
        assert quantized(mlp(), feeds, recipe=recipe_of(range_type)).metrics["sqnr_db"] > 15

    @pytest.mark.parametrize("range_type", RANGE_TYPES)
    def test_tensors_without_elements_inside(self, range_type: str) -> None:
        """A layer behind NonZero sees nothing in most samples."""
        body = """g (float[N,16] x) => (float[N,16] y, float[M,4] z) {
            y = MatMul (x, w) s = ReduceSum <keepdims = 0> (x, axis) high = Greater (s, limit) at = NonZero (high)
            at1 = Squeeze (at, zero) rows = Gather <axis = 0> (x, at1) z = MatMul (rows, v) }"""
        weights = weights_of(1, w=(16, 16), v=(16, 4))
        constants = {"axis": np.asarray([1]), "limit": np.asarray(4, np.float32), "zero": np.asarray([0])}
        proto = parse(body, {**weights, **constants})
        feeds = feeds_for(proto, 24)
        counts = [o[1].shape[0] for o in outputs_of(proto, feeds)]
        assert 0 in counts, "the test needs empty tensors"
        assert max(counts) > 0
        result = quantized(proto, feeds, recipe=recipe_of(range_type), min_sqnr=0.0)
        assert len(result.plan.weights) == 2

    def test_a_layer_that_never_sees_anything(self) -> None:
        body = """g (float[N,16] x) => (float[N,8] y) { e = Slice (x, zero, zero, zero) z = MatMul (e, w)
            y = MatMul (x, w) s = Shape (z) }"""
        proto = parse(body, weights_of(1, w=(16, 8)) | {"zero": np.asarray([0])})
        with pytest.raises(CalibrationError, match=r"tensor 'e'.*no finite value"):
            quantized(proto)
        assert quantized(proto, exclude=["MatMul_z"]).plan.quantized_nodes() == ["MatMul_y"]


class TestInvalidResults:
    """Success was reported for models that do not load."""

    @pytest.mark.parametrize("opset", [7, 9, 11, 12, 13, 17, 18, 21, 23])
    @pytest.mark.parametrize("make", [cnn, mlp])
    def test_opsets(self, make: Any, opset: int, tmp_path: Path) -> None:
        proto = make(opset)
        paths = quantized(proto).save(tmp_path / "m.onnx")
        saved = onnx.load(paths.model)
        onnx.checker.check_model(paths.model, full_check=True)
        assert saved.opset_import[0].version == max(opset, 13), "the lowest that per-channel scales need"
        assert {o.domain for o in saved.opset_import} == {""}
        feeds = feeds_for(proto, 4, seed=3)
        assert sqnr_of(outputs_of(proto, feeds), outputs_of(saved, feeds)) > 40

    @pytest.mark.parametrize("target", ["cpu", "generic", "openvino"])
    @pytest.mark.parametrize("opset", [13, 17, 19])
    def test_float16(self, opset: int, target: str, tmp_path: Path) -> None:
        half = {
            k: v.astype(np.float16)
            for k, v in weights_of(1, w=(8, 3, 1, 1), b=(8,), k=(8, 4), c=(4,)).items()
        }
        body = """g (float16[N,3,8,8] x) => (float16[N,4] y) { h = Conv (x, w, b) r = Relu (h) p = GlobalAveragePool (r)
            f = Flatten (p) m = MatMul (f, k) y = Add (m, c) }"""
        proto = parse(body, half, opset)
        result = quantized(proto, target=target)
        paths = result.save(tmp_path / "m.onnx")
        saved = onnx.load(paths.model)
        assert saved.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16
        (output,) = session_of(saved).run(None, dict(feeds_for(proto, 1)[0]))
        assert output.dtype == np.float16
        assert len(result.plan.weights) == 2
        assert result.metrics["sqnr_db"] > 25

    def test_already_quantized_is_refused(self, tmp_path: Path) -> None:
        paths = quantized(mlp()).save(tmp_path / "q.onnx")
        with pytest.raises(
            GraphError, match=r"q.onnx is already quantized \(node 'x_QuantizeLinear' and \d+ more\)"
        ):
            quantize(paths.model, calib_data=feeds_for(mlp()))

    def test_its_float_part_may_be_quantized_on_request(self) -> None:
        partly = quantized(mlp(), exclude=["mm3"]).model
        result = quantized(partly, feeds_for(mlp()), allow_quantized=True)
        assert result.plan.quantized_nodes() == ["mm3"]

    def test_names_that_run_into_each_other(self) -> None:
        """Bias b0 shared, activation b00, and names that the tool would give itself."""
        weights = weights_of(1, w1=(4, 3, 1, 1), b0=(4,), w2=(4, 4, 1, 1))
        body = """g (float[N,3,8,8] x) => (float[N,4,8,8] y) { b00 = Conv (x, w1, b0) b0_quantized = Relu (b00)
            x_scale = Conv (b0_quantized, w2, b0) b0_dequantized = Relu (x_scale) y = Relu (b0_dequantized) }"""
        result = quantized(parse(body, weights))
        assert len(result.plan.weights) == 2
        assert result.metrics["sqnr_db"] > 30

    def test_duplicate_node_names(self) -> None:
        """ONNX Runtime refuses the file itself; patterns mean both."""
        proto = cnn()
        for node in proto.graph.node:
            node.name = "conv" if node.op_type == "Conv" else node.name
        result = quantized(proto)
        assert len(result.plan.weights) == 4
        names = [n.name for n in result.model.graph.node]
        assert len(names) == len(set(names))
        assert quantized(proto, exclude=["conv"]).plan.quantized_nodes() == ["fc"]

    def test_nodes_without_names(self) -> None:
        proto = cnn()
        for node in proto.graph.node:
            node.name = ""
        nodes = quantized(proto).plan.quantized_nodes()
        assert nodes == ["Conv_c1", "Conv_c2", "Conv_c3", "Gemm_y"]
        assert quantized(proto, exclude=["Conv_c*"]).plan.quantized_nodes() == ["Gemm_y"]

    def test_nodes_out_of_order(self) -> None:
        proto = cnn()
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reversed(proto.graph.node)]
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        result = quantized(proto)
        onnx.checker.check_model(result.model, full_check=True)
        assert sqnr_of(outputs_of(cnn(), feeds_for(cnn())), outputs_of(result.model, feeds_for(cnn()))) > 40


class TestNumbers:
    """NaN, infinities, zeros and overflows: an error names the tensor and the sample, or a policy deals with it."""

    def _feeds(self, bad: float) -> list[Feed]:
        feeds = feeds_for(mlp())
        x = np.array(feeds[3]["x"])
        x[:, 1] = bad
        feeds[3] = {"x": x}
        return feeds

    @pytest.mark.parametrize("range_type", RANGE_TYPES)
    @pytest.mark.parametrize(
        ("bad", "text"),
        [(np.nan, "3 NaN and 0 Inf"), (np.inf, "0 NaN and 3 Inf"), (-np.inf, "0 NaN and 3 Inf")],
    )
    def test_the_error_names_tensor_and_sample(self, bad: float, text: str, range_type: str) -> None:
        with pytest.raises(
            CalibrationError, match=f"tensor 'x': {text} values, first in sample 3; fix the sample"
        ):
            quantized(mlp(), self._feeds(bad), recipe=recipe_of(range_type))

    @pytest.mark.parametrize("range_type", RANGE_TYPES)
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_ignore(self, bad: float, range_type: str) -> None:
        result = quantized(mlp(), self._feeds(bad), nan="ignore", recipe=recipe_of(range_type), min_sqnr=0.0)
        assert len(result.plan.weights) == 3
        for params in result.plan.params.values():
            assert np.isfinite(params.scale).all()
        assert any("tensor 'x'" in n and n.endswith("ignored") for n in result.notes)
        assert result.metrics["sqnr_db"] > 15

    def test_ignored_samples_do_not_change_the_rest(self) -> None:
        """A sample of nothing but NaN leaves ranges and codes as if it were not there."""
        feeds = feeds_for(mlp(), 7)  # below 8: all calibrate
        nothing: Feed = {"x": np.full((3, 16), np.nan, np.float32)}
        clean, with_it = (
            quantized(mlp(), feeds),
            quantized(mlp(), [*feeds, nothing][:8], nan="ignore", eval_data=feeds),
        )
        for a, b in zip(clean.plan.params.values(), with_it.plan.params.values(), strict=True):
            assert (float(a.scale), int(a.zero_point)) == (float(b.scale), int(b.zero_point))

    def test_exclude_layer(self) -> None:
        """Only the layers that read or make what is not finite stay float."""
        body = """g (float[N,16] x) => (float[N,8] y) { [a] h = MatMul (x, w1) s = Sqrt (h) [b] k = MatMul (s, w2)
            bad = IsNaN (k) m = Where (bad, zero, k) [c] y = MatMul (m, w3) }"""
        proto = parse(
            body, weights_of(1, w1=(16, 16), w2=(16, 8), w3=(8, 8)) | {"zero": np.zeros((), np.float32)}
        )
        with pytest.raises(CalibrationError, match="tensor 's'"):
            quantized(proto, min_sqnr=0.0)
        result = quantized(proto, nan="exclude-layer", min_sqnr=0.0)
        assert result.plan.quantized_nodes() == ["a", "c"]
        assert result.skipped == {"b": "its input 's' has NaN or Inf"}

    def test_exclude_layer_looks_at_outputs_too(self) -> None:
        """A Conv whose own output overflows, behind which a Clip makes it finite again."""
        body = "g (float[N,3,8,8] x) => (float[N,4,8,8] y) { [a] h = Conv (x, w) c = Tanh (h) [b] y = Conv (c, v) }"
        weights = weights_of(1, w=(8, 3, 1, 1), v=(4, 8, 1, 1))
        weights["w"][0] = 0
        weights["w"][0, 0] = 3e38
        result = quantized(parse(body, weights), nan="exclude-layer", min_sqnr=0.0)
        assert result.plan.quantized_nodes() == ["b"]
        assert result.skipped == {"a": "its output 'h' has NaN or Inf"}

    def test_exclude_layer_keeps_the_output_that_a_neighbour_needs(self) -> None:
        """A 2-D MatMul with a residual Add fuses with an output Q only; leaving another out must not lose that."""
        body = """g (float[N,16] x) => (float[N,16] y, float[N,16] z) { [a] m = MatMul (x, w) y = Add (m, x)
            s = Sqrt (x) [b] z = MatMul (s, v) }"""
        proto = parse(body, weights_of(1, w=(16, 16), v=(16, 16)))
        result = quantized(proto, nan="exclude-layer", min_sqnr=0.0)
        assert result.plan.quantized_nodes() == ["a"]

    def test_when_nothing_is_left_nothing_is_done(self) -> None:
        feeds: list[Feed] = [{"x": np.full((3, 16), np.nan, np.float32)}] * 8
        with pytest.raises(GraphError, match=r"no layer can be quantized.*'x' has NaN or Inf"):
            quantized(mlp(), feeds, nan="exclude-layer", min_sqnr=0.0)

    @pytest.mark.parametrize("make", [cnn, mlp])
    def test_nothing_but_zeros(self, make: Any) -> None:
        proto = make()
        result = quantized(proto, [{"x": np.asarray(f["x"]) * 0} for f in feeds_for(proto)])
        (slot,) = {
            s.params
            for u, s in result.plan.activations.items()
            if isinstance(u, Use) and u.node in ("conv1", "mm1")
        }
        assert float(result.plan.params[slot].scale) == 1.0
        exact, seen = outputs_of(proto, feeds_for(proto)), outputs_of(result.model, feeds_for(proto))
        assert all(
            np.isfinite(z[0]).all() and z[0].shape == y[0].shape for y, z in zip(exact, seen, strict=True)
        )

    @pytest.mark.parametrize("make", [cnn, mlp])
    def test_weights_of_zeros(self, make: Any) -> None:
        proto = make()
        for tensor in proto.graph.initializer:
            zeros = np.zeros(tuple(tensor.dims), np.float32)
            if tensor.name.startswith("w"):
                tensor.CopyFrom(numpy_helper.from_array(zeros, tensor.name))
        feeds = feeds_for(proto)
        exact, seen = outputs_of(proto, feeds), outputs_of(quantized(proto, feeds).model, feeds)
        for y, z in zip(exact, seen, strict=True):
            np.testing.assert_allclose(z[0], y[0], rtol=0.02, atol=1e-3)

    def test_a_weight_with_infinity_stays_float(self) -> None:
        proto = mlp()
        values = numpy_helper.to_array(proto.graph.initializer[4]).copy()  # w3
        values[0, 0] = np.inf
        proto.graph.initializer[4].CopyFrom(numpy_helper.from_array(values, proto.graph.initializer[4].name))
        result = quantized(proto, min_sqnr=0.0)
        assert result.skipped == {"mm3": "its weight holds NaN or Inf"}

    def test_no_samples(self) -> None:
        with pytest.raises(CalibrationError, match="no samples"):
            quantized(mlp(), [])

    def test_a_bias_beyond_int32(self) -> None:
        proto = cnn()
        tensor = next(t for t in proto.graph.initializer if t.name == "b2")
        big = numpy_helper.to_array(tensor).copy()
        big[0] = 3e7
        tensor.CopyFrom(numpy_helper.from_array(big, "b2"))
        result = quantized(proto)
        assert any("weight scales raised so that the bias fits int32" in n for n in result.notes)
        assert all(b.clipped == 0 for b in result.plan.bias_codes.values())
        assert result.metrics["sqnr_db"] > 30

    def test_one_huge_activation(self) -> None:
        """Far outliers do not make scales infinite or codes wrap around."""
        feeds = feeds_for(mlp())
        x = np.array(feeds[0]["x"])
        x[0, 0] = 1e30
        result = quantized(mlp(), [{"x": x}, *feeds[1:]], min_sqnr=0.0)
        assert all(np.isfinite(p.scale).all() for p in result.plan.params.values())
        x[0] = 3e38
        with pytest.raises(
            CalibrationError, match="tensor 'r1': 0 NaN and"
        ):  # the float model itself overflows there
            quantized(mlp(), [{"x": x}, *feeds[1:]])


class TestPatterns:
    """Exclusions were ignored without a word; names had shifted."""

    @pytest.mark.parametrize(
        ("pattern", "left"),
        [
            ("conv1", ["conv2", "conv3", "fc"]),
            ("conv*", ["fc"]),
            ("re:conv[12]", ["conv3", "fc"]),
            ("op:Gemm", ["conv1", "conv2", "conv3"]),
            ("w2", ["conv1", "conv3", "fc"]),
            ("*[13]", ["conv2", "fc"]),
        ],
    )
    def test_exclude(self, pattern: str, left: list[str]) -> None:
        result = quantized(
            cnn(), exclude=[pattern], target="generic"
        )  # others may leave further layers float
        assert result.plan.quantized_nodes() == left
        assert set(result.skipped.values()) == {f"excluded by pattern '{pattern}'"}

    def test_include(self) -> None:
        result = quantized(cnn(), include=["op:Conv", "fc"], exclude=["conv2"])
        assert result.plan.quantized_nodes() == ["conv1", "conv3", "fc"]

    @pytest.mark.parametrize("pattern", ["covn1", "re:conv[89]", "op:LSTM", "CONV1", "conv"])
    def test_one_that_matches_nothing(self, pattern: str) -> None:
        with pytest.raises(
            RecipeError,
            match=rf"exclude: pattern '{re.escape(pattern)}' matches no layer; .*(conv|operators)",
        ):
            quantized(cnn(), exclude=[pattern])

    def test_everything_excluded(self) -> None:
        with pytest.raises(GraphError, match=r"no layer can be quantized.*excluded by pattern"):
            quantized(cnn(), exclude=["*"])

    def test_names_of_the_file_survive_simplification(self) -> None:
        """A BatchNormalization that is folded and a Gemm that is rewritten do not rename the layer."""
        weights = weights_of(1, w=(8, 3, 3, 3), fc=(5, 8), c=(1, 5))
        stats = {n: np.abs(weights_of(2, n=(8,))["n"]) + 0.5 for n in ("s", "m", "v", "b")}
        body = """g (float[N,3,8,8] x) => (float[N,5] y) { h = Conv (x, w) n = BatchNormalization (h, s, b, m, v)
            p = GlobalAveragePool (n) f = Flatten (p) y = Gemm <transB = 1, alpha = 0.5> (f, fc, c) }"""
        proto = parse(body, {**weights, **stats})
        for node, name in zip(proto.graph.node, ("stem.0", "stem.1", "pool", "flat", "head/fc"), strict=True):
            node.name = name
        assert quantized(proto).plan.quantized_nodes() == ["stem.0", "head/fc"]
        assert quantized(proto, exclude=["head/*"]).plan.quantized_nodes() == ["stem.0"]


class TestSubgraphsAndSharing:
    """If, Loop and Scan; tied weights; initializers that are inputs."""

    WEIGHTS = weights_of(1, w=(16, 16), v=(16, 16), u=(16, 4))

    def _check(
        self, body: str, quantized_nodes: list[str], extra: dict[str, NDArray[np.generic]] | None = None
    ) -> onnx.ModelProto:
        proto = parse(body, {**self.WEIGHTS, **(extra or {})})
        result = quantized(proto)
        assert result.plan.quantized_nodes() == quantized_nodes
        nodes = {n.name: n for n in result.model.graph.node}
        for node in proto.graph.node:
            for attr in node.attribute:
                if attr.type == onnx.AttributeProto.GRAPH:
                    kept = next(a for a in nodes[node.name].attribute if a.name == attr.name)
                    assert kept.g == attr.g, "a subgraph is written back as it was"
                    assert "subgraph" in result.skipped[node.name]
        feeds = feeds_for(proto, 4, seed=8)
        assert sqnr_of(outputs_of(proto, feeds), outputs_of(result.model, feeds)) > 25
        return result.model

    def test_if(self) -> None:
        """Both branches read outer values: a layer's output and a weight that a layer outside shares."""
        self._check(
            """g (float[N,16] x, bool flag) => (float[N,4] y) { [a] h = MatMul (x, w)
            [branch] k = If (flag) <then_branch = t () => (float[N,16] p) { q = MatMul (h, w) p = Relu (q) },
                                    else_branch = e () => (float[N,16] r) { r = Tanh (h) }>
            [b] y = MatMul (k, u) }""",
            ["a", "b"],
        )

    def test_loop(self) -> None:
        self._check(
            """g (float[N,16] x) => (float[N,4] y) { [a] h = MatMul (x, w)
            [loop] k = Loop (three, , h) <body = b (int64 i, bool c, float[N,16] s) => (bool d, float[N,16] o)
                { d = Identity (c) q = MatMul (s, v) o = Tanh (q) }>
            [b] y = MatMul (k, u) }""",
            ["a", "b"],
            {"three": np.asarray(3)},
        )

    def test_scan(self) -> None:
        self._check(
            """g (float[N,16] x) => (float[N,16] y) { [a] h = MatMul (x, w)
            [scan] end, y = Scan <num_scan_inputs = 1, body = b (float[16] s, float[16] r) => (float[16] t, float[16] o)
                { t = Add (s, r) o = Tanh (t) }> (start, h) }""",
            ["a"],
            {"start": np.zeros(16, np.float32)},
        )

    def test_a_conv_output_that_a_subgraph_reads(self) -> None:
        weights = weights_of(1, c=(8, 3, 1, 1), d=(8, 8, 1, 1))
        body = """g (float[N,3,8,8] x, bool flag) => (float[N,8,8,8] y) { [a] h = Conv (x, c)
            [branch] k = If (flag) <then_branch = t () => (float[N,8,8,8] p) { p = Relu (h) },
                                    else_branch = e () => (float[N,8,8,8] r) { r = Neg (h) }>
            [b] y = Conv (k, d) }"""
        self._check(body, ["a", "b"], dict(weights))

    def test_tied_weights_stay_tied(self) -> None:
        body = """g (float[N,16] x) => (float[N,16] y) { [a] h = MatMul (x, w) r = Tanh (h) [b] k = MatMul (r, w)
            y = Relu (k) }"""
        model = self._check(body, ["a", "b"])
        assert sum(t.data_type == TensorProto.INT8 and len(t.dims) == 2 for t in model.graph.initializer) == 1
        assert not any(t.data_type == TensorProto.FLOAT and len(t.dims) == 2 for t in model.graph.initializer)

    def test_a_weight_that_an_embedding_shares_stays_there(self) -> None:
        """Gather reads the float values; the MatMul's codes do not change what it looks up."""
        body = """g (int64[N] ids) => (float[N,16] y, float[N,16] e) { e = Gather (table, ids) [head] y = MatMul (e, w)
            t = Identity (table) }"""
        proto = parse(body, {"table": self.WEIGHTS["v"], "w": self.WEIGHTS["w"]})
        feeds = [{"ids": np.arange(i, i + 3)} for i in range(8)]
        result = quantized(proto, feeds)
        exact, seen = outputs_of(proto, feeds), outputs_of(result.model, feeds)
        for y, z in zip(exact, seen, strict=True):
            np.testing.assert_array_equal(z[1], y[1])

    def test_initializers_that_are_inputs(self) -> None:
        proto = cnn(7)
        proto.ir_version = 3
        for tensor in proto.graph.initializer:
            proto.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
        result = quantized(proto, feeds_for(cnn()))
        assert [i.name for i in result.model.graph.input] == ["x"]
        assert any("initializers were also graph inputs" in n for n in result.notes)

    @pytest.mark.parametrize("shape", [(4,), (1, 4), (1,), ()])
    @pytest.mark.parametrize("attributes", ["", "<transB = 1>", "<transB = 1, alpha = 0.5, beta = 2.0>"])
    def test_gemm_biases(self, shape: tuple[int, ...], attributes: str) -> None:
        weights = {"w": weights_of(1, w=(16, 4))["w"], "b": np.full(shape, 0.75, np.float32)}
        if attributes:
            weights["w"] = np.ascontiguousarray(weights["w"].T)
        proto = parse(
            f"g (float[N,16] x) => (float[N,4] y) {{ [fc] y = Gemm {attributes} (x, w, b) }}", weights
        )
        result = quantized(proto)
        assert result.plan.quantized_nodes() == ["fc"]
        assert result.metrics["sqnr_db"] > 35

    def test_gemm_with_a_transposed_input(self) -> None:
        proto = parse(
            "g (float[16,N] x) => (float[N,4] y) { [fc] y = Gemm <transA = 1> (x, w, b) }",
            weights_of(1, w=(16, 4), b=(4,)),
        )
        for recipe in ("w8a8", "w8a8-output-mse"):
            assert quantized(proto, recipe=recipe).metrics["sqnr_db"] > 35
