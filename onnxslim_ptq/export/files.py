"""Where results go and how they get there: all files of a result appear together, or nothing changes on disk."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from calib.errors import GraphError
from calib.model import LARGE, Model
from calib.tensors import has_plain_dtype
from calib.types import Array

__all__ = ["AtomicFiles", "OutputPaths", "create", "output_paths", "write_model"]

EMBEDDED_LIMIT = 2**31 - 1 - 2**20  # protobuf ends at 2 GiB; the margin is for readers that add to the graph
_HEAD = frozenset(
    {"name", "dims", "data_type", "doc_string", "metadata_props"}
)  # a tensor without its values
_FILE_MODE = 0o640  # umask 027; a stricter umask of the user is kept
_CURES = {
    errno.ENOSPC: "free the disk or choose another OUT",
    errno.ENOTDIR: "a file stands where a folder would; an OUT that is one file ends in .onnx",
    errno.EEXIST: "a file stands where a folder would; an OUT that is one file ends in .onnx",
}


@dataclass(frozen=True)
class OutputPaths:
    """The files of one result; None for a file that the result does not have, ``others`` beside them."""

    model: Path
    data: Path | None
    json: Path
    params: Path | None
    others: tuple[Path, ...] = ()

    def only(self, names: set[str]) -> OutputPaths:
        """The same paths without the optional files that are not among ``names``."""
        data, params = (p if p and p.name in names else None for p in (self.data, self.params))
        return replace(self, data=data, params=params)

    def inside(self, folder: Path) -> OutputPaths:
        """The same names in another folder."""
        return OutputPaths(
            folder / self.model.name,
            folder / self.data.name if self.data else None,
            folder / self.json.name,
            folder / self.params.name if self.params else None,
            tuple(folder / other.name for other in self.others),
        )

    def in_order(self) -> list[Path]:
        """Every path, a file before those that refer to it."""
        first = [path for path in (self.data, self.params) if path is not None]
        return [*first, *self.others, self.model, self.json]


def output_paths(out: Path, source_stem: str, quant_type: str, others: tuple[str, ...] = ()) -> OutputPaths:
    """Where every file of a result may go: ``out`` itself when it ends in .onnx, else ``<source_stem>_<type>`` in it.

    ``data`` and ``params`` are named too, although a small model needs neither; ``others`` are further file names.
    """
    model = out if out.name.lower().endswith(".onnx") else out / f"{source_stem}_{quant_type.lower()}.onnx"
    stem = model.name[: -len(".onnx")]
    return OutputPaths(
        model,
        model.with_name(f"{model.name}.data"),
        model.with_name(f"{stem}.json"),
        model.with_name(f"{stem}.params.safetensors"),
        tuple(model.with_name(name) for name in others),
    )


class AtomicFiles:
    """Writes the files of a result in a hidden folder beside their destination and moves them out at ``commit``.

    Within the ``with`` block files are written and verified under ``temporary`` (final names, hence external data
    resolves). Leaving the block without a commit, by whatever exception, removes them and every folder that was made,
    and leaves what stood at the destination as it was. A link at the destination is replaced, not followed.
    """

    def __init__(self, paths: OutputPaths, protected: Iterable[Path] = ()) -> None:
        self.paths = paths
        self.temporary = paths
        self.folder = (
            paths.model.parent
        )  # the hidden folder inside the block; scratch files there vanish with it
        self._protected = list(protected)
        self._made: list[Path] = []
        self._hidden: Path | None = None

    def __enter__(self) -> AtomicFiles:
        """Make the hidden folder; raises GraphError when a destination is an input, a folder, two files' or not
        writable."""
        parent = self.paths.model.parent
        try:
            with _explained(parent):
                _refuse_inputs(self.paths, self._protected)
                self._make_folders(parent)
                self._hidden = Path(tempfile.mkdtemp(".tmp", f".{self.paths.model.stem[:40]}.", parent))
        except BaseException:
            self._remove()
            raise
        self.folder = self._hidden
        self.temporary = self.paths.inside(self._hidden)
        return self

    def __exit__(self, *raised: object) -> None:
        self._remove()

    def commit(self) -> OutputPaths:
        """Flush what was written to the disk, move it to its destination and return the paths that exist now.

        Raises GraphError when the disk refuses; then the destination is as it was before.
        """
        parent = self.paths.model.parent
        pairs = [(new, parent / new.name) for new in self.temporary.in_order() if new.is_file()]
        with _explained(parent):
            for new, _ in pairs:
                _flush(new)
            _move(pairs)
        self._made.clear()  # the folders stay
        _flush_folder(parent)
        return self.paths.only({final.name for _, final in pairs})

    def _make_folders(self, folder: Path) -> None:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(0o750)
            self._made.append(path)

    def _remove(self) -> None:
        if self._hidden is not None:
            shutil.rmtree(self._hidden, ignore_errors=True)
        for path in reversed(self._made):
            try:
                path.rmdir()
            except OSError:  # somebody else put a file there meanwhile
                break


def _move(pairs: list[tuple[Path, Path]]) -> None:
    """Rename each new file over its destination; a failure half-way puts the old files back."""
    started: list[tuple[Path, Path, Path]] = []
    try:
        for new, final in pairs:
            started.append((new, final, new.with_name(f"{new.name}.old")))
            if os.path.lexists(final):
                try:  # give what stands there a second name
                    os.link(final, started[-1][2], follow_symlinks=False)
                except (OSError, NotImplementedError):  # no hard links here (FAT, some network folders)
                    os.replace(final, started[-1][2])
            os.replace(new, final)
    except BaseException:
        for new, final, old in reversed(started):
            if os.path.lexists(old):
                os.replace(old, final)
            elif not new.exists():  # it was moved, to where nothing stood
                final.unlink(missing_ok=True)
        raise


def _refuse_inputs(paths: OutputPaths, protected: list[Path]) -> None:
    every = paths.in_order()
    twice = next((path for path in every if every.count(path) > 1), None)
    if twice is not None:
        raise GraphError(f"two files of the result would be called '{twice.name}'; rename one of them")
    for path in every:
        if path.is_dir():
            raise GraphError(f"output '{path}' is a folder; choose another OUT or remove the folder")
        source = next((p for p in protected if path.exists() and p.exists() and path.samefile(p)), None)
        if source is not None:
            raise GraphError(f"output '{path}' is the same file as the input '{source}'; choose another OUT")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line for a person."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        cure = _CURES.get(error.errno or 0, "choose another OUT, in a folder of yours")
        raise GraphError(f"output '{path}' cannot be written ({reason}); {cure}") from None


@contextmanager
def create(path: Path) -> Iterator[BufferedWriter]:
    """A new file, never open to everybody; raises GraphError when the disk refuses."""
    with (
        _explained(path),
        open(path, "wb", opener=lambda name, flags: os.open(name, flags, _FILE_MODE)) as file,
    ):
        yield file


def _flush(path: Path) -> None:
    """Give the file its mode and put it on the disk."""
    read_only = not path.stat().st_mode & 0o200
    with path.open("rb" if read_only else "rb+") as file:
        path.chmod(os.fstat(file.fileno()).st_mode & _FILE_MODE)
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    # Windows cannot open a folder and some network file systems cannot flush one; the files are complete all the same.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class _Initializer:
    """A large initializer: its proto without values, and the values, little-endian, wherever they lie."""

    head: TensorProto
    values: Array

    def start(self) -> bytes:
        """All of its bytes in the graph but the values: field 5, a tensor that ends with raw_data (9)."""
        inner = _serialized(self.head) + _tag(9, self.values.nbytes)
        return _tag(5, len(inner) + self.values.nbytes) + inner

    def raw(self) -> memoryview:
        return np.ascontiguousarray(self.values).reshape(-1).view(np.uint8).data


def write_model(model: Model, path: Path, *, external: bool = False) -> list[Path]:
    """Write the model tensor by tensor; above 2 GB, or when asked, its large tensors go to ``<path>.data`` beside it.

    Returns the files written. Raises GraphError when a weight does not fit its declaration, when what is left of the
    graph exceeds 2 GB, or when the disk refuses.
    """
    rest = b"".join(_fields(model.proto, "graph"))
    graph: list[bytes | _Initializer] = list(_fields(model.proto.graph, "initializer"))
    graph += [_initializer(tensor, model) for tensor in model.proto.graph.initializer]
    written = [path]
    if external or len(rest) + _nbytes(graph) > EMBEDDED_LIMIT:
        data = path.with_name(f"{path.name}.data")
        if any(isinstance(piece, _Initializer) for piece in graph):
            written.insert(0, data)
            graph = _write_data(graph, data)
    if len(rest) + _nbytes(graph) > EMBEDDED_LIMIT:
        raise GraphError(
            f"output '{path}' exceeds 2 GB even with external data: large constants lie inside nodes or "
            "subgraphs; make them initializers of the main graph"
        )
    with create(path) as file:
        file.write(rest + _tag(7, _nbytes(graph)))
        for piece in graph:
            file.write(piece if isinstance(piece, bytes) else piece.start())
            if isinstance(piece, _Initializer):
                file.write(piece.raw())
    return written


def _write_data(graph: list[bytes | _Initializer], data: Path) -> list[bytes | _Initializer]:
    """Write the large initializers to ``data``; returns the graph with references in their place."""
    referring: list[bytes | _Initializer] = []
    with create(data) as file:
        for piece in graph:
            if isinstance(piece, _Initializer):
                align = 4096 if piece.values.nbytes >= 2**20 else 64  # whole pages can be mapped by a runtime
                file.write(bytes(-file.tell() % align))
                head = TensorProto.FromString(piece.head.SerializeToString())
                head.data_location = TensorProto.EXTERNAL
                for key, value in (
                    ("location", data.name),
                    ("offset", file.tell()),
                    ("length", piece.values.nbytes),
                ):
                    head.external_data.add(key=key, value=str(value))
                file.write(piece.raw())
                piece = _serialized(onnx.GraphProto(initializer=[head]))
            referring.append(piece)
    return referring


def _initializer(tensor: TensorProto, model: Model) -> bytes | _Initializer:
    values = model.weights.get(tensor.name)
    if values is None and tensor.data_location == TensorProto.EXTERNAL:
        raise GraphError(
            f"initializer '{tensor.name}' has no values; this is a defect here, please report it"
        )
    if values is None and len(tensor.raw_data) < LARGE:
        return _serialized(onnx.GraphProto(initializer=[tensor]))
    if values is None:
        values = np.frombuffer(tensor.raw_data, np.uint8)
    elif values.dtype != onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) or values.shape != tuple(
        tensor.dims
    ):
        raise GraphError(
            f"initializer '{tensor.name}' is declared as {list(tensor.dims)} but its values are "
            f"{values.dtype}{list(values.shape)}; this is a defect here, please report it"
        )
    elif not has_plain_dtype(
        tensor.data_type
    ):  # int4, bfloat16, ...: packed below a byte where the format says so
        values = np.frombuffer(onnx.numpy_helper.from_array(values).raw_data, np.uint8)
    head = TensorProto(**{field.name: value for field, value in tensor.ListFields() if field.name in _HEAD})
    return _Initializer(head, values.astype(values.dtype.newbyteorder("<"), copy=False))


def _fields(message: Any, skipped: str) -> Iterator[bytes]:
    """The serialized message in pieces, one per item, without field ``skipped``."""
    for field, value in message.ListFields():
        if field.name != skipped:
            single = hasattr(value, "CopyFrom") or isinstance(value, (str, bytes, int))
            for item in [value] if single else value:
                yield _serialized(type(message)(**{field.name: item if single else [item]}))


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString(deterministic=True))


def _nbytes(graph: list[bytes | _Initializer]) -> int:
    return sum(len(p) if isinstance(p, bytes) else len(p.start()) + p.values.nbytes for p in graph)


def _tag(number: int, length: int) -> bytes:
    """Protobuf: field ``number`` holds ``length`` bytes."""
    out, value = bytearray([number << 3 | 2]), length
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
