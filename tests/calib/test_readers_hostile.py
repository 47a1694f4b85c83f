"""Damaged and malicious files: an error that names the file, never a pickle, a crash or a full memory."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calib.errors import CalibrationError
from calib.readers import ReadLimits, open_data
from calib.types import InputInfo

X = InputInfo("x", np.dtype(np.float32), None)
MIB = 1 << 20


class Bomb:
    """Unpickling an instance creates the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def npy(shape: object = (2, 3), descr: object = "<f4", data: bytes = b"\0" * 24, version: int = 1) -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return raw_npy(header, data, version)


def raw_npy(header: bytes, data: bytes = b"", version: int = 1) -> bytes:
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", len(header))
        + header
        + data
    )


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def refused(path: Path, *parts: str, stacked: bool = False, limits: ReadLimits = ReadLimits()) -> None:  # noqa: B008
    with pytest.raises(CalibrationError) as error:
        list(open_data([path], [X], stacked=stacked, limits=limits))
    text = str(error.value)
    assert "\n" not in text
    for part in (path.name, *parts):
        assert part in text, text


@pytest.fixture(params=["npy", "npz"])
def store(request: pytest.FixtureRequest, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Writes .npy content as such a file, or as the one member of an .npz."""

    def write(content: bytes) -> Path:
        if request.param == "npz":
            return zipped(tmp_path / "s.npz", {"x.npy": content})
        (tmp_path / "s.npy").write_bytes(content)
        return tmp_path / "s.npy"

    return write


class TestPickle:
    def test_object_array_is_not_unpickled(self, store, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        stream = io.BytesIO()
        np.save(stream, np.array([Bomb(tmp_path / "owned")], object), allow_pickle=True)
        refused(store(stream.getvalue()), "Python objects", "never unpickled")
        assert not (tmp_path / "owned").exists()

    def test_structured_with_objects(self, store) -> None:  # type: ignore[no-untyped-def]
        refused(store(npy((1,), [("a", "|O")])), "Python objects")

    @pytest.mark.parametrize("name", ["s.npy", "s.npz"])
    def test_pickle_under_another_name(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "owned")))
        refused(tmp_path / name)
        assert not (tmp_path / "owned").exists()

    def test_stacked(self, store) -> None:  # type: ignore[no-untyped-def]
        refused(store(npy((3,), "|O")), "Python objects", stacked=True)


class TestBombs:
    def test_npz_bomb(self, tmp_path: Path) -> None:
        header = npy((64 * MIB,), data=b"")
        with (
            zipfile.ZipFile(tmp_path / "s.npz", "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("x.npy", "w") as member,
        ):
            member.write(header)
            for _ in range(256):
                member.write(bytes(MIB))
        assert (tmp_path / "s.npz").stat().st_size < MIB
        tracemalloc.start()
        refused(tmp_path / "s.npz", "256.0 MiB, more than the 64.0 MiB allowed", limits=ReadLimits(64 * MIB))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * MIB

    def test_many_arrays_count_together(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "s.npz", **{f"x{i}": np.zeros(MIB, np.uint8) for i in range(9)})
        refused(tmp_path / "s.npz", "9.0 MiB, more than the 8.0 MiB allowed", limits=ReadLimits(8 * MIB))

    def test_too_many_members(self, tmp_path: Path) -> None:
        refused(
            zipped(tmp_path / "s.npz", {f"{i}.npy": npy() for i in range(5)}),
            "5 arrays",
            limits=ReadLimits(max_arrays=4),
        )

    def test_header_of_4_gib(self, store) -> None:  # type: ignore[no-untyped-def]
        refused(store(b"\x93NUMPY\x02\x00" + b"\xff" * 4 + b"{" * 100), "header of 4294967295 bytes")

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_unbounded_decompressors(self, tmp_path: Path, method: int) -> None:
        refused(
            zipped(tmp_path / "s.npz", {"x.npy": npy()}, method), "unusually compressed", "savez_compressed"
        )

    @pytest.mark.parametrize(
        "shape", [(1 << 40,), (1 << 62, 1 << 62), (1 << 62,) * 32, (10**4000,), (0, 10**4000)]
    )
    def test_header_promises_more_than_there_is(self, store, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
        refused(store(npy(shape)), "header")

    def test_directory_lies_like_the_header(self, tmp_path: Path) -> None:
        content = npy((MIB,), data=b"\0" * 400)
        size, claimed = len(content), len(content) - 400 + 4 * MIB
        path = zipped(tmp_path / "s.npz", {"x.npy": content}, zipfile.ZIP_STORED)
        path.write_bytes(
            path.read_bytes().replace(struct.pack("<I", size) * 2, struct.pack("<II", size, claimed))
        )
        refused(path)

    def test_member_longer_than_the_directory_says(self, tmp_path: Path) -> None:
        content = npy((2, 3), data=b"\0" * 24 + b"\1" * 5000)
        path = zipped(tmp_path / "s.npz", {"x.npy": content})
        honest = struct.pack("<I", len(content))
        path.write_bytes(path.read_bytes().replace(honest, struct.pack("<I", len(content) - 5000)))
        refused(path)


class TestHeaders:
    @pytest.mark.parametrize("shape", [(-1,), (-2, -3), (2.0,), "ab", None, (1,) * 33])
    def test_impossible_shape(self, store, shape: object) -> None:  # type: ignore[no-untyped-def]
        refused(store(npy(shape)))

    @pytest.mark.parametrize(
        "descr", ["|S0", "|V0", [("a", "<f4")], ("<f4", (2,)), "nonsense", 7, "<f4" * 50]
    )
    def test_odd_dtype(self, store, descr: object) -> None:  # type: ignore[no-untyped-def]
        refused(store(npy(descr=descr)))

    @pytest.mark.parametrize(
        "header",
        [b"", b"(" * 9000, b"__import__('os')", b"{'shape': (1,)}", b"\xff" * 40, b"{" + b"[" * 200, b"'\\"],
    )
    def test_damaged(self, store, header: bytes) -> None:  # type: ignore[no-untyped-def]
        refused(store(raw_npy(header)), "damaged .npy header")

    @pytest.mark.parametrize("content", [b"", b"\x93NUM", b"PK\x03\x04", b"\x93NUMPY\x01", b"hello world"])
    def test_not_npy(self, store, content: bytes) -> None:  # type: ignore[no-untyped-def]
        refused(store(content), "not a .npy array")

    @pytest.mark.parametrize("version", [0, 3, 9])
    def test_version(self, store, version: int) -> None:  # type: ignore[no-untyped-def]
        refused(store(npy(version=version)), f"version {version}.0")

    @pytest.mark.parametrize("change", [-1, -24, 1, 4000])
    def test_length(self, store, change: int) -> None:  # type: ignore[no-untyped-def]
        refused(store(npy(data=b"\0" * (24 + change))), "promises")


class TestArchives:
    def test_repeated_member(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
            archive.writestr("x.npy", npy())
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("x.npy", npy())
        refused(tmp_path / "s.npz", "repeated")

    def test_member_that_is_no_array(self, tmp_path: Path) -> None:
        refused(zipped(tmp_path / "s.npz", {"evil.py": b"1"}), "'evil.py'")

    def test_empty(self, tmp_path: Path) -> None:
        refused(zipped(tmp_path / "s.npz", {}), "0 arrays")

    def test_crc(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "s.npz", {"x.npy": npy(data=b"\x55" * 24)}, zipfile.ZIP_STORED)
        path.write_bytes(path.read_bytes().replace(b"\x55" * 24, b"\x54" * 24))
        refused(path, "CRC")
        refused(path, "CRC", stacked=True)

    def test_encrypted(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "s.npz", {"x.npy": npy()})
        content = bytearray(path.read_bytes())
        content[content.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)
        refused(path, "encrypted")

    def test_pipe_does_not_block(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "s.npy")
        refused(tmp_path / "s.npy", "not a regular file")

    def test_name_that_would_break_the_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a\n\x1b[31m.npy"
        path.write_bytes(b"")
        with pytest.raises(CalibrationError) as error:
            list(open_data([path], [X]))
        assert str(error.value).isprintable()

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
    @given(st.data(), st.booleans(), st.booleans())
    def test_flipped_bytes(self, tmp_path: Path, data: st.DataObject, as_zip: bool, stacked: bool) -> None:
        stream = io.BytesIO()
        if as_zip:
            np.savez_compressed(
                stream, x=np.arange(6, dtype=np.float32).reshape(2, 3), y=np.zeros(2, np.int64)
            )
        else:
            np.save(stream, np.arange(6, dtype=np.float32).reshape(2, 3))
        content = bytearray(stream.getvalue())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = tmp_path / ("s.npz" if as_zip else "s.npy")
        path.write_bytes(
            content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
        )
        inputs = [X, InputInfo("y", np.dtype(np.int64), None)] if as_zip else [X]
        try:
            list(open_data([path], inputs, stacked=stacked))
        except CalibrationError as error:
            assert "\n" not in str(error)  # noqa: PT017 - any other exception is the failure looked for
