"""Opening models: every way to store a weight gives the same Model; damaged or hostile ones give one clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib.errors import GraphError
from calib.model import LARGE, open_model

W = np.arange(30 * 20, dtype=np.float32).reshape(30, 20) / 7
B = np.linspace(-1, 1, 20, dtype=np.float32)

TEXT = """
<ir_version: 8, opset_import: ["" : 17]> g (float[N,30] x) => (float[N,20] y) {
  a = MatMul (x, w)
  y = Add (a, b)
}
"""


def plain(text: str = TEXT) -> onnx.ModelProto:
    """The layer with both weights embedded as raw data."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend([numpy_helper.from_array(W, "w"), numpy_helper.from_array(B, "b")])
    return proto


def written(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def external(proto: onnx.ModelProto, folder: Path, threshold: int = 0) -> Path:
    path = folder / "e.onnx"
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location="e.data", size_threshold=threshold)
    return path


def as_float_data(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data.extend(W.reshape(-1).tolist())


def as_constant_node(proto: onnx.ModelProto) -> None:
    tensor = TensorProto.FromString(proto.graph.initializer[0].SerializeToString())
    tensor.name = ""
    del proto.graph.initializer[0]
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))


class TestStorage:
    @pytest.mark.parametrize("change", [lambda p: None, as_float_data, as_constant_node])
    @pytest.mark.parametrize("store", [written, external, lambda proto, folder: proto])
    def test_same_weights(
        self,
        tmp_path: Path,
        change: Callable[[onnx.ModelProto], None],
        store: Callable[[onnx.ModelProto, Path], Path | onnx.ModelProto],
    ) -> None:
        proto = plain()
        change(proto)
        model = open_model(store(proto, tmp_path))
        assert list(model.weights) == ["w"]  # b is below LARGE
        np.testing.assert_array_equal(model.weights["w"], W)
        assert model.weights["w"].dtype == np.float32
        b = next(t for t in model.proto.graph.initializer if t.name == "b")
        np.testing.assert_array_equal(numpy_helper.to_array(b), B)
        assert [n.op_type for n in model.proto.graph.node] == ["MatMul", "Add"]
        assert W.nbytes < model.nbytes < W.nbytes + 2000

    @pytest.mark.parametrize("threshold", [0, 1000, 1024, 10_000])
    def test_sha256_does_not_depend_on_storage(self, tmp_path: Path, threshold: int) -> None:
        embedded = open_model(written(plain(), tmp_path)).sha256
        assert open_model(external(plain(), tmp_path, threshold)).sha256 == embedded
        assert open_model(plain()).sha256 == embedded
        assert open_model(onnx.load(external(plain(), tmp_path, threshold))).sha256 == embedded

    def test_sha256_depends_on_values_names_and_structure(self) -> None:
        base = open_model(plain()).sha256
        other = plain()
        other.graph.initializer[0].CopyFrom(numpy_helper.from_array(W + 1, "w"))
        assert open_model(other).sha256 != base
        other = plain()
        other.graph.node[1].op_type = "Sub"
        assert open_model(other).sha256 != base

    def test_input_proto_is_never_changed(self) -> None:
        for change in (lambda p: None, as_float_data, as_constant_node):
            proto = plain()
            change(proto)
            before = proto.SerializeToString()
            model = open_model(proto)
            model.proto.graph.node[0].op_type = "Changed"
            assert proto.SerializeToString() == before

    def test_weights_are_read_only_views(self, tmp_path: Path) -> None:
        for path in (written(plain(), tmp_path), external(plain(), tmp_path)):
            weight = open_model(path).weights["w"]
            assert not weight.flags.writeable
            assert not weight.flags.owndata

    @pytest.mark.parametrize("shift", range(8))
    def test_unaligned_offsets(self, tmp_path: Path, shift: int) -> None:
        proto = plain()
        proto.producer_name = "p" * shift
        model = open_model(written(proto, tmp_path))
        np.testing.assert_array_equal(model.weights["w"], W)
        assert len(model.sha256) == 64

    def test_same_result_in_onnx_runtime(self, tmp_path: Path) -> None:
        model = open_model(external(plain(), tmp_path))
        options = ort.SessionOptions()
        values = [
            ort.OrtValue.ortvalue_from_numpy(np.require(v, requirements="CA")) for v in model.weights.values()
        ]
        options.add_external_initializers(list(model.weights), values)
        x = np.ones((2, 30), np.float32)
        session = ort.InferenceSession(model.proto.SerializeToString(), options)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ W + B, rtol=1e-5)

    @pytest.mark.parametrize(
        "dtype",
        [
            "int4",
            "uint4",
            "bfloat16",
            "float8_e4m3fn",
            "float8_e5m2",
            "float16",
            "int8",
            "bool",
            "int64",
            "complex64",
        ],
    )
    def test_every_type_survives(self, tmp_path: Path, dtype: str) -> None:
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
        values = (np.arange(3000) % 7).astype(kind)
        proto = plain()
        proto.graph.initializer.append(numpy_helper.from_array(values, "t"))
        if kind == np.float16:  # int32_data carries float16 bit patterns
            tensor = proto.graph.initializer[2]
            tensor.ClearField("raw_data")
            tensor.int32_data.extend(values.view(np.uint16).tolist())
        hashes = set()
        for source in (proto, written(proto, tmp_path), external(proto, tmp_path)):
            model = open_model(source)
            if "t" in model.weights:
                got = model.weights["t"]
            else:
                tensor = next(t for t in model.proto.graph.initializer if t.name == "t")
                assert tensor.HasField("raw_data")
                got = numpy_helper.to_array(tensor)
            np.testing.assert_array_equal(got.astype(np.complex64), values.astype(np.complex64))
            hashes.add(model.sha256)
        assert len(hashes) == 1


class TestNested:
    IF = """
    <ir_version: 8, opset_import: ["" : 17]> g (bool c, float[600] x) => (float[600] y) {
      y = If (c) <then_branch = t () => (float[600] a) { a = Add (x, inner) },
                  else_branch = e () => (float[600] b) { k = Constant <value = float {2.0}> () b = Mul (x, k) }>
    }"""

    def branch_model(self) -> onnx.ModelProto:
        proto = onnx.parser.parse_model(self.IF)
        inner = numpy_helper.from_array(np.arange(600, dtype=np.float32), "inner")
        proto.graph.node[0].attribute[0].g.initializer.append(inner)
        return proto

    def test_subgraph_initializers_stay_inside(self, tmp_path: Path) -> None:
        proto = self.branch_model()
        for source in (proto, written(proto, tmp_path)):
            model = open_model(source)
            assert model.weights == {}
            assert model.proto == proto

    def test_external_subgraph_initializers_are_embedded(self, tmp_path: Path) -> None:
        proto = self.branch_model()
        values = proto.graph.node[0].attribute[0].g.initializer[0]
        (tmp_path / "w.data").write_bytes(values.raw_data)
        moved = self.branch_model()
        tensor = moved.graph.node[0].attribute[0].g.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.data")
        assert open_model(written(moved, tmp_path)).proto == proto

    def test_functions_keep_their_body(self, tmp_path: Path) -> None:
        text = """
        <ir_version: 8, opset_import: ["" : 17, "f" : 1]> g (float[600] x) => (float[600] y) { y = f.twice (x) }
        <domain: "f", opset_import: ["" : 17]> twice (x) => (y) { k = Constant <value = float {2.0}> () y = Mul (x, k) }
        """
        proto = onnx.parser.parse_model(text)
        tensor = proto.functions[0].node[0].attribute[0].t
        tensor.CopyFrom(TensorProto(data_type=1, dims=[600], data_location=TensorProto.EXTERNAL))
        tensor.external_data.add(key="location", value="w.data")
        (tmp_path / "w.data").write_bytes(np.ones(600, np.float32).tobytes())
        model = open_model(written(proto, tmp_path))
        assert numpy_helper.to_array(model.proto.functions[0].node[0].attribute[0].t).sum() == 600

    def test_sparse_initializers_survive(self, tmp_path: Path) -> None:
        proto = plain()
        values = numpy_helper.from_array(np.ones(2, np.float32), "s")
        indices = numpy_helper.from_array(np.array([1, 5], np.int64))
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9]))
        for source in (proto, written(proto, tmp_path)):
            assert open_model(source).proto.graph.sparse_initializer == proto.graph.sparse_initializer

    def test_constant_that_is_an_output_stays_a_node(self, tmp_path: Path) -> None:
        proto = plain()
        as_constant_node(proto)
        proto.graph.output.append(helper.make_tensor_value_info("w", 1, [30, 20]))
        model = open_model(written(proto, tmp_path))
        assert model.proto.graph.node[0].op_type == "Constant"
        np.testing.assert_array_equal(numpy_helper.to_array(model.proto.graph.node[0].attribute[0].t), W)

    @pytest.mark.parametrize(
        ("attribute", "values"),
        [
            ("value_float = 2.5", 2.5),
            ("value_floats = [1.0, 2.0]", [1.0, 2.0]),
            ("value_int = 3", 3),
            ("value_ints = [4, 5]", [4, 5]),
        ],
    )
    def test_short_constants_are_lifted(self, attribute: str, values: object) -> None:
        text = (
            f'<ir_version: 3, opset_import: ["" : 17]> g () => (float y) {{ k = Constant <{attribute}> () '
            "y = Cast <to = 1> (k) }"
        )
        model = open_model(onnx.parser.parse_model(text))
        assert [n.op_type for n in model.proto.graph.node] == ["Cast"]
        np.testing.assert_array_equal(numpy_helper.to_array(model.proto.graph.initializer[0]), values)
        assert model.proto.ir_version == 4  # an initializer that is no graph input

    def test_string_constants_stay(self) -> None:
        proto = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]> g () => (string y) { k = Constant <value_string = "a"> () '
            "y = Identity (k) }"
        )
        assert open_model(proto).proto == proto


def test_documentation_that_is_no_text(tmp_path: Path) -> None:
    proto = plain()
    proto.doc_string, proto.graph.doc_string = "model: grün", "graph: grün"
    path = written(proto, tmp_path)
    path.write_bytes(path.read_bytes().replace("grün".encode(), b"gr\xfcn!"))
    copy = open_model(path)
    assert copy.proto.doc_string == "model: gr\ufffdn!"
    assert open_model(copy.proto.FromString(path.read_bytes())).sha256 == copy.sha256


class TestInputs:
    def test_defaults_are_no_inputs_and_dimensions_are_kept(self) -> None:
        text = (
            '<ir_version: 8, opset_import: ["" : 17]> g (float[N,30,?] x, float[20] b, float16 h, float[] s) => '
            "(float[N,20] y) { y = Identity (x) }"
        )
        proto = onnx.parser.parse_model(text)
        proto.graph.initializer.append(numpy_helper.from_array(B, "b"))
        proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -1
        x, h, s = open_model(proto).inputs()
        assert (x.name, x.shape, x.dtype) == ("x", ("N", None, None), np.float32)
        assert h.dtype == np.float16
        assert s.dtype == np.float32

    def test_no_tensor(self) -> None:
        text = '<ir_version: 8, opset_import: ["" : 17]> g (seq(float[N]) x) => (float y) { y = SequenceLength (x) }'
        with pytest.raises(GraphError, match="'x' is not a tensor"):
            open_model(onnx.parser.parse_model(text)).inputs()

    def test_no_type(self) -> None:
        proto = plain()
        proto.graph.input[0].type.tensor_type.elem_type = 0
        with pytest.raises(GraphError, match="'x' has the unknown element type 0"):
            open_model(proto).inputs()


def test_large_is_the_limit() -> None:
    proto = plain()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(LARGE, np.int8), "at"))
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(LARGE - 1, np.int8), "below"))
    assert set(open_model(proto).weights) == {"w", "at"}
