"""External data entries: numbers, shapes and attributes that no honest exporter writes are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from calib.external import read_tensor
from tests.calib.test_external import VALUES, refused, tensor


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model path with VALUES in w.data beside it."""
    (tmp_path / "w.data").write_bytes(VALUES.tobytes())
    return tmp_path / "m.onnx"


class TestNumbers:
    @pytest.mark.parametrize(
        "value", ["-1", "+1", "1.5", "1e3", " 4", "4 ", "", "0x10", "٣", "1_000", str(1 << 63), "9" * 30]
    )
    @pytest.mark.parametrize("key", ["offset", "length"])
    def test_malformed(self, model: Path, key: str, value: str) -> None:
        refused(model, tensor(**{key: value}), f"{key} ", "no number of bytes")

    def test_huge_length(self, model: Path) -> None:
        refused(model, tensor(length=1 << 50), "length", str(1 << 50))

    def test_huge_shape(self, model: Path) -> None:
        refused(model, tensor(dims=(1 << 48,), length=1 << 50), "takes more than")
        refused(model, tensor(dims=(1 << 62,) * 20), "takes")
        refused(model, tensor(dims=(1,) * 1000), "impossible shape")

    def test_negative_shape(self, model: Path) -> None:
        refused(model, tensor(dims=(-2, -3)), "impossible shape")

    def test_past_the_end(self, model: Path) -> None:
        refused(model, tensor(offset=1), "ends at byte 25", "has 24")
        refused(model, tensor(offset=(1 << 63) - 1), "ends at byte")

    @pytest.mark.parametrize("length", [0, 23, 25])
    def test_length_is_not_what_the_shape_takes(self, model: Path, length: int) -> None:
        refused(model, tensor(length=length), f"length {length}", "24 bytes")

    @pytest.mark.parametrize("kind", [TensorProto.UNDEFINED, TensorProto.STRING, 99])
    def test_dtype(self, model: Path, kind: int) -> None:
        refused(model, tensor(dtype=kind), "data type")


class TestAttributes:
    @pytest.mark.parametrize("key", ["__class__", "open", "Location", "location ", "size"])
    def test_unknown(self, model: Path, key: str) -> None:
        refused(model, tensor(**{key: "1"}), "unknown attribute", key)

    def test_repeated(self, model: Path) -> None:
        proto = tensor()
        proto.external_data.add(key="location", value="../secret")
        refused(model, proto, "repeats", "location")

    def test_harmless_ones_are_ignored(self, model: Path) -> None:
        np.testing.assert_array_equal(read_tensor(model, tensor(checksum="0" * 40, basepath="/etc")), VALUES)

    def test_embedded_tensor(self, model: Path) -> None:
        refused(model, TensorProto(name="w", data_type=1, dims=[1], raw_data=b"1234"), "inside the model")
