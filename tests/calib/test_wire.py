"""The wire walker: what it takes out can be put back byte by byte, and garbage is refused, never half read."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from calib.errors import GraphError
from calib.model import open_model
from calib.wire import OWN_FILE, read_skeleton

BIG = np.arange(600, dtype=np.float32)

TEXT = """
<ir_version: 8, opset_import: ["" : 17], doc_string: "about"> g (float[1,600] x) => (float[1,600] y) {
  [add] a = Add (x, big)
  [mul] y = Mul (a, small)
}
"""


def model() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.initializer.append(numpy_helper.from_array(BIG, "big"))
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(2), "small"))
    return proto


def entries(tensor: TensorProto) -> dict[str, str]:
    return {e.key: e.value for e in tensor.external_data}


def taken(data: bytes, threshold: int = 1024) -> tuple[onnx.ModelProto, list[tuple[int, int]]]:
    skeleton = read_skeleton(memoryview(data), threshold)
    return onnx.ModelProto.FromString(skeleton.data), sorted(skeleton.spans)


class TestTaken:
    def test_large_payload_leaves_and_its_span_is_exact(self) -> None:
        data = model().SerializeToString()
        proto, spans = taken(data)
        big, small = proto.graph.initializer
        assert entries(big)["location"] == OWN_FILE
        assert (int(entries(big)["offset"]), int(entries(big)["length"])) == spans[0]
        start, length = spans[0]
        assert data[start : start + length] == BIG.tobytes()
        assert not big.HasField("raw_data")
        assert small == model().graph.initializer[1]
        assert len(proto.SerializeToString()) < len(data) - BIG.nbytes + 200

    def test_everything_else_is_the_same(self) -> None:
        proto, _ = taken(model().SerializeToString())
        wanted = model()
        del proto.graph.initializer[:]
        del wanted.graph.initializer[:]
        assert proto == wanted

    def test_small_model_is_byte_exact(self) -> None:
        data = model().SerializeToString()
        skeleton = read_skeleton(memoryview(data), 1 << 20)
        assert skeleton.data == data
        assert skeleton.spans == frozenset()

    def test_large_message_without_large_tensor_is_byte_exact(self) -> None:
        proto = model()
        proto.graph.node[0].doc_string = "d" * 5000
        del proto.graph.initializer[0]
        assert read_skeleton(memoryview(proto.SerializeToString()), 1024).data == proto.SerializeToString()

    def test_packed_float_data(self) -> None:
        proto = model()
        proto.graph.initializer[0].CopyFrom(TensorProto(name="big", dims=[600], data_type=1, float_data=BIG))
        data = proto.SerializeToString()
        (start, length) = taken(data)[1][0]
        assert data[start : start + length] == BIG.tobytes()

    def test_float_data_of_another_type_stays(self) -> None:
        proto = model()
        proto.graph.initializer[0].CopyFrom(TensorProto(name="big", dims=[300], data_type=14, float_data=BIG))
        assert taken(proto.SerializeToString())[1] == []

    def test_constant_node(self) -> None:
        proto = model()
        constant = onnx.helper.make_node("Constant", [], ["big"], value=numpy_helper.from_array(BIG))
        proto.graph.node.insert(0, constant)
        del proto.graph.initializer[0]
        skeleton, spans = taken(proto.SerializeToString())
        assert len(spans) == 1
        assert entries(skeleton.graph.node[0].attribute[0].t)["location"] == OWN_FILE

    def test_tensor_already_external_stays(self) -> None:
        proto = model()
        tensor = proto.graph.initializer[0]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
        skeleton, spans = taken(proto.SerializeToString())
        assert spans == []
        assert skeleton == proto

    def test_payload_split_over_two_fields_stays(self) -> None:
        twice = TensorProto(name="big", dims=[600], data_type=1, raw_data=BIG.tobytes())
        doubled = twice.SerializeToString() + TensorProto(raw_data=BIG.tobytes()).SerializeToString()
        graph = onnx.GraphProto.FromString(model().graph.SerializeToString())
        del graph.initializer[0]
        body = graph.SerializeToString() + b"\x2a" + _length(doubled) + doubled
        assert taken(b"\x3a" + _length(body) + body)[1] == []


def _length(payload: bytes) -> bytes:
    size, out = len(payload), bytearray()
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes([*out, size])


class TestGarbage:
    @pytest.mark.parametrize(
        "data", [b"\xff" * 20, b"\x08", b"\x3a\x05ab", b"\x0b\x0c", b"\x3a" + b"\xff" * 9 + b"\x01x"]
    )
    def test_refused(self, data: bytes) -> None:
        with pytest.raises(GraphError):
            read_skeleton(memoryview(data))

    def test_every_truncation_is_refused_or_smaller(self) -> None:
        data = model().SerializeToString()
        for end in [*range(1, 60), *range(len(data) - 200, len(data), 7)]:
            try:
                skeleton = read_skeleton(memoryview(data[:end]), 1024)
            except GraphError:
                continue
            assert len(skeleton.data) <= end + 100  # cut between two fields of the model: nothing invented

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6), st.data()
    )
    def test_mutated_files_open_or_raise_graph_error(
        self, tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], draw: st.DataObject
    ) -> None:
        data = bytearray(SMALL_HEADER)
        for at, value in flips:
            data[at % len(data)] = value
        cut = draw.draw(st.integers(1, len(data)) | st.just(len(data)))
        path = tmp_path_factory.getbasetemp() / "mutated.onnx"
        path.write_bytes(bytes(data[:cut]))
        with contextlib.suppress(GraphError):
            opened = open_model(path)
            opened.inputs()
            assert len(opened.sha256) == 64


def _interleaved() -> bytes:
    """A model whose structure is most of its bytes, so that flipped bytes hit structure."""
    proto = model()
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros(256, np.float32), "big"))
    return proto.SerializeToString()


SMALL_HEADER = _interleaved()
