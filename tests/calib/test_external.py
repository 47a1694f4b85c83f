"""External data: everything inside the model's folder can be read, nothing outside it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from calib.errors import GraphError
from calib.external import ExternalSpan, read, read_tensor, resolve

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def tensor(
    location: str | None = "w.data",
    *,
    dtype: int = TensorProto.FLOAT,
    dims: tuple[int, ...] = (2, 3),
    **entries: object,
) -> TensorProto:
    proto = TensorProto(name="w", data_type=dtype, dims=dims, data_location=TensorProto.EXTERNAL)
    pairs = {} if location is None else {"location": location}
    for key, value in {**pairs, **entries}.items():
        proto.external_data.add(key=key, value=str(value))
    return proto


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model path inside its own folder, with VALUES in w.data beside it and the same bytes outside."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w.data").write_bytes(VALUES.tobytes())
    (tmp_path / "secret").write_bytes(VALUES.tobytes())
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "w.data").write_bytes(VALUES.tobytes())
    return folder / "m.onnx"


def refused(model: Path, proto: TensorProto, *parts: str) -> None:
    with pytest.raises(GraphError) as error:
        resolve(model, proto)
    text = str(error.value)
    assert "\n" not in text
    for part in (str(model), "'w'", ";", *parts):
        assert part in text, text


class TestReads:
    def test_values(self, model: Path) -> None:
        found = read_tensor(model, tensor(offset=0, length=24))
        np.testing.assert_array_equal(found, VALUES)
        assert not found.flags.writeable

    def test_span(self, model: Path) -> None:
        span = resolve(model, tensor(offset=4, dims=(5,)))
        assert (span.path, span.offset, span.length) == (model.parent / "w.data", 4, 20)

    @pytest.mark.parametrize(
        "location", ["./w.data", "sub/w.data", "sub//w.data", "sub/./w.data", "w..data", "..w"]
    )
    def test_plain_locations(self, model: Path, location: str) -> None:
        (model.parent / "sub").mkdir()
        path = model.parent / location
        path.write_bytes(VALUES.tobytes())
        np.testing.assert_array_equal(read_tensor(model, tensor(location)), VALUES)

    def test_relative_model_path(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model.parent)
        np.testing.assert_array_equal(read_tensor(Path("m.onnx"), tensor()), VALUES)

    @pytest.mark.parametrize("offset", [1, 3, 4097])
    @pytest.mark.parametrize(
        "kind", [TensorProto.FLOAT, TensorProto.INT64, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN]
    )
    def test_unaligned_offset(self, model: Path, offset: int, kind: int) -> None:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        values = np.arange(6).astype(dtype)
        (model.parent / "w.data").write_bytes(b"x" * offset + values.tobytes())
        found = read_tensor(model, tensor(dtype=kind, offset=offset))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(np.float64), np.arange(6.0).reshape(2, 3))

    @pytest.mark.parametrize(
        ("kind", "nbytes"),
        [("INT4", 4), ("UINT4", 4), ("FLOAT4E2M1", 4), ("INT2", 2), ("UINT2", 2), ("FLOAT6E2M3", 6)],
    )
    def test_packed_types_are_raw_bytes(self, model: Path, kind: str, nbytes: int) -> None:
        if kind not in TensorProto.DataType.keys():  # noqa: SIM118 - a protobuf enum is no mapping
            pytest.skip("this onnx does not know the type")
        found = read_tensor(
            model,
            tensor(
                dtype=TensorProto.DataType.Value(kind),
                dims=(7,),
                length=(7 * {4: 4, 2: 2, 6: 6}[nbytes] + 7) // 8,
            ),
        )
        np.testing.assert_array_equal(found, np.frombuffer(VALUES.tobytes(), np.uint8)[: len(found)])
        assert found.nbytes == nbytes

    def test_int4_length_as_onnx_packs_it(self, model: Path) -> None:
        packed = onnx.numpy_helper.from_array(np.arange(5).astype(ml_dtypes.int4), "w")
        (model.parent / "w.data").write_bytes(packed.raw_data)
        found = read_tensor(model, tensor(dtype=TensorProto.INT4, dims=(5,), length=len(packed.raw_data)))
        assert found.tobytes() == packed.raw_data

    def test_empty_and_scalar(self, model: Path) -> None:
        assert read_tensor(model, tensor(dims=(0, 3))).shape == (0, 3)
        assert not read_tensor(model, tensor(dims=(0, 3))).flags.writeable
        assert read_tensor(model, tensor(dims=())).shape == ()

    def test_what_onnx_writes(self, tmp_path: Path) -> None:
        weight = onnx.numpy_helper.from_array(VALUES, "w")
        graph = onnx.helper.make_graph([], "g", [], [], [weight])
        onnx.save(
            onnx.helper.make_model(graph),
            tmp_path / "m.onnx",
            save_as_external_data=True,
            location="m.data",
            size_threshold=0,
        )
        loaded = onnx.load(tmp_path / "m.onnx", load_external_data=False)
        np.testing.assert_array_equal(read_tensor(tmp_path / "m.onnx", loaded.graph.initializer[0]), VALUES)

    def test_memory_is_mapped_not_read(self, model: Path) -> None:
        with (model.parent / "w.data").open("r+b") as stream:
            stream.truncate(1 << 36)  # sparse: 64 GiB that only a mapping can open
        found = read_tensor(model, tensor(dims=(1 << 34,)))
        assert found.shape == (1 << 34,)
        assert found[5] == 5

    def test_folder_reached_through_a_link_above_the_model(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "alias").symlink_to(model.parent)
        np.testing.assert_array_equal(read_tensor(tmp_path / "alias" / "m.onnx", tensor()), VALUES)


class TestLocation:
    @pytest.mark.parametrize(
        "location",
        [
            "../secret",
            "junk/../../secret",
            "sub/../w.data",
            "..",
            "a/..",
            "/etc/passwd",
            "//etc/passwd",
            "./../secret",
        ],
    )
    def test_leaving_the_folder(self, model: Path, location: str) -> None:
        refused(model, tensor(location), "leaves the model's folder", "beside the model")

    @pytest.mark.parametrize(
        "location", ["..\\secret", "sub\\w.data", "C:\\x", "C:x", "c:/x", "w.data\0", "a\0/../b", "x" * 5000]
    )
    def test_tricks(self, model: Path, location: str) -> None:
        refused(model, tensor(location), "no plain relative path")

    @pytest.mark.parametrize("location", ["", ".", "./", "sub/", "w.data/", "w.data/."])
    def test_no_file_named(self, model: Path, location: str) -> None:
        refused(model, tensor(location), "names no file")

    def test_location_absent(self, model: Path) -> None:
        refused(model, tensor(None), "names no file")

    def test_missing_file(self, model: Path) -> None:
        refused(model, tensor("gone.data"), "gone.data", "No such file", "copy it beside the model")

    def test_in_memory_marker_of_onnxruntime(self, model: Path) -> None:
        refused(model, tensor("*/_ORT_MEM_ADDR_/*", offset=1234), "No such file")

    def test_message_stays_on_one_line(self, model: Path) -> None:
        refused(model, tensor("a\nb"), "cannot be read")

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
    @given(
        st.lists(
            st.sampled_from(["..", ".", "", "sub", "link", "w.data", "/", "\\", "C:", "~", "secret"]),
            max_size=6,
        )
    )
    def test_never_outside(self, model: Path, parts: list[str]) -> None:
        link = model.parent / "link"
        if not link.is_symlink():
            link.symlink_to(model.parent.parent)
        try:
            span = resolve(model, tensor("/".join(parts)))
        except GraphError:
            return
        assert span.path == model.parent / "w.data"


class TestFiles:
    def test_linked_file(self, model: Path, tmp_path: Path) -> None:
        (model.parent / "l.data").symlink_to(tmp_path / "secret")
        refused(model, tensor("l.data"), "is a link", "copy")

    def test_linked_file_inside_the_folder(self, model: Path) -> None:
        (model.parent / "l.data").symlink_to("w.data")
        refused(model, tensor("l.data"), "is a link")

    def test_linked_parent(self, model: Path, tmp_path: Path) -> None:
        (model.parent / "sub").symlink_to(tmp_path / "outside")
        refused(model, tensor("sub/w.data"), "folder sub is a link")

    def test_linked_grandparent(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "outside" / "deep").mkdir()
        (tmp_path / "outside" / "deep" / "w.data").write_bytes(VALUES.tobytes())
        (model.parent / "sub").symlink_to(tmp_path / "outside")
        refused(model, tensor("sub/deep/w.data"), "folder sub is a link")

    def test_hard_link(self, model: Path, tmp_path: Path) -> None:
        (model.parent / "h.data").hardlink_to(tmp_path / "secret")
        refused(model, tensor("h.data"), "hard link")

    def test_hard_link_in_a_folder_called_blobs(self, model: Path, tmp_path: Path) -> None:
        (model.parent / "blobs").mkdir()
        (model.parent / "blobs" / "h").hardlink_to(tmp_path / "secret")
        refused(model, tensor("blobs/h"), "hard link")

    def test_pipe(self, model: Path) -> None:
        os.mkfifo(model.parent / "p.data")
        refused(model, tensor("p.data"), "no regular file")

    def test_socket(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model.parent)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s.data")
            refused(model, tensor("s.data"), "no regular file")

    def test_folder(self, model: Path) -> None:
        (model.parent / "d.data").mkdir()
        refused(model, tensor("d.data"), "no regular file")

    def test_file_as_folder(self, model: Path) -> None:
        refused(model, tensor("w.data/x"), "link or no folder")

    def test_model_is_a_link_and_data_is_not_beside_it(self, model: Path, tmp_path: Path) -> None:
        model.write_bytes(b"")
        link = tmp_path / "m.onnx"
        link.symlink_to(model)
        refused(link, tensor(), "beside the link", "real path")

    def test_swapped_between_resolve_and_read(self, model: Path, tmp_path: Path) -> None:
        span = resolve(model, tensor())
        (model.parent / "w.data").unlink()
        (model.parent / "w.data").write_bytes((tmp_path / "secret").read_bytes())
        stale = ExternalSpan(span.path, span.offset, span.length, (span.identity[0], span.identity[1] + 1))
        with pytest.raises(GraphError, match="changed while the model was open"):
            read(stale, np.dtype(np.float32), (2, 3))
        (model.parent / "w.data").unlink()
        (model.parent / "w.data").symlink_to(tmp_path / "secret")
        with pytest.raises(GraphError, match="cannot be opened"):
            read(span, np.dtype(np.float32), (2, 3))

    def test_shortened_between_resolve_and_read(self, model: Path) -> None:
        span = resolve(model, tensor())
        os.truncate(model.parent / "w.data", 8)
        with pytest.raises(GraphError, match="changed"):
            read(span, np.dtype(np.float32), (2, 3))

    def test_read_checks_the_size(self, model: Path) -> None:
        span = resolve(model, tensor())
        for shape in ((3, 3), (-2, -3)):
            with pytest.raises(GraphError, match="are no float32 array"):
                read(span, np.dtype(np.float32), shape)
