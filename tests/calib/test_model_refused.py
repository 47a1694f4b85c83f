"""Damaged and hostile models give one clear error and read nothing outside the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper

from calib.errors import GraphError
from calib.model import open_model
from calib.wire import OWN_FILE

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


class TestRefused:
    def refused(self, source: Path | onnx.ModelProto | str, *words: str) -> None:
        with pytest.raises(GraphError) as caught:
            open_model(source)
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)

    def test_paths(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none.onnx", "does not exist")
        self.refused(tmp_path, "is a folder")
        (tmp_path / "empty.onnx").touch()
        self.refused(tmp_path / "empty.onnx", "is empty")
        (tmp_path / "text.onnx").write_text("hello, this is no model at all")
        self.refused(tmp_path / "text.onnx", "text.onnx")
        (tmp_path / "page.onnx").write_text("<!DOCTYPE html><html>not found</html>")
        self.refused(tmp_path / "page.onnx", "page.onnx")

    def test_no_graph(self, tmp_path: Path) -> None:
        self.refused(written(onnx.ModelProto(ir_version=8), tmp_path), "holds no graph")

    def test_truncated_inside_a_weight(self, tmp_path: Path) -> None:
        path = written(plain(), tmp_path)
        path.write_bytes(path.read_bytes()[:1000])
        self.refused(path, "truncated")

    @pytest.mark.parametrize(
        "keys",
        [
            {},
            {"offset": "0"},
            {"length": "2400"},
            {"offset": "0", "length": "2400"},
            {"offset": "-5", "length": "2400"},
            {"offset": "x", "length": "2400"},
            {"offset": str(10**30), "length": "2400"},
            {"offset": "0", "length": str(1 << 62)},
        ],
    )
    def test_forged_marker(self, tmp_path: Path, keys: dict[str, str]) -> None:
        proto = plain()
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": OWN_FILE, **keys}.items():
            tensor.external_data.add(key=key, value=value)
        self.refused(written(proto, tmp_path), "'w'")
        self.refused(proto, "'w'", "from memory")

    def test_marker_beside_a_payload(self, tmp_path: Path) -> None:
        proto = plain()
        proto.graph.initializer[0].external_data.add(key="location", value="../../etc/passwd")
        np.testing.assert_array_equal(open_model(written(proto, tmp_path)).weights["w"], W)
        proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
        self.refused(written(proto, tmp_path), "leaves the model's folder")

    def test_external_location_outside(self, tmp_path: Path) -> None:
        proto = plain()
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/passwd")
        self.refused(written(proto, tmp_path), "leaves the model's folder")

    @pytest.mark.parametrize("dims", [[30, 21], [600], [-30, -20], [1 << 40, 1 << 40]])
    def test_shape_does_not_fit(self, tmp_path: Path, dims: list[int]) -> None:
        proto = plain()
        proto.graph.initializer[0].dims[:] = dims
        sources = (proto, written(proto, tmp_path))
        if dims == [600]:
            assert open_model(sources[1]).weights["w"].shape == (600,)
            return
        for source in sources:
            self.refused(source, "'w'", "damaged")
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(W, "w"))
        proto.graph.initializer[1].dims[:] = dims
        for source in (proto, written(proto, tmp_path)):
            self.refused(source, "'b'")

    @pytest.mark.parametrize("data_type", [0, 99])
    def test_unknown_type(self, tmp_path: Path, data_type: int) -> None:
        proto = plain()
        proto.graph.initializer[0].data_type = data_type
        self.refused(written(proto, tmp_path), "'w'")

    def test_twice_and_unnamed(self) -> None:
        proto = plain()
        proto.graph.initializer[1].name = "w"
        self.refused(proto, "'w' is defined twice")
        proto.graph.initializer[1].name = ""
        self.refused(proto, "has no name")

    def test_names_that_are_no_text(self, tmp_path: Path) -> None:
        path = written(plain(), tmp_path)
        path.write_bytes(path.read_bytes().replace(b"MatMul", b"Mat\xfful"))
        self.refused(path, "UTF-8")
