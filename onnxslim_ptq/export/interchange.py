"""Weight files of one tool as those of another: which pairs there are, reading, writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from calib.types import Array
from onnxslim_ptq.core.pack import read_packed, tell_packed
from onnxslim_ptq.errors import GraphError, RecipeError
from onnxslim_ptq.export.files import AtomicFiles, create, output_paths
from onnxslim_ptq.export.golden_stick import WEIGHT, from_ascend_v1, from_int4, to_ascend_v1
from onnxslim_ptq.export.packed_int4 import Read, read_autoawq, read_autogptq
from onnxslim_ptq.export.read_weights import read_tensors, read_weight_files, tensor_files
from onnxslim_ptq.export.tensors import TensorSet
from onnxslim_ptq.export.weight_files import WeightFiles, Write, files_of

__all__ = ["CONVERSIONS", "convert", "write_tensors"]

ASCEND_V1, GOLDEN_STICK = "ascend_v1", "golden_stick"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name and the files they are in; ``kinds`` where a description tells them; ``packed``: the tensors that
    hold two values to a byte, where a file says so."""

    tensors: Mapping[str, Array]
    files: tuple[Path, ...]
    kinds: Mapping[str, str] = field(default_factory=dict)
    packed: frozenset[str] = frozenset()


def _int4(read: Callable[[Mapping[str, Array]], Read], checkpoint: Checkpoint) -> Mapping[str, Array]:
    return from_int4(*read(checkpoint.tensors))


# (from, to) -> the tensors in their new form; TensorSet where they have kinds.
CONVERSIONS: dict[tuple[str, str], Callable[[Checkpoint], Mapping[str, Array] | TensorSet]] = {
    (ASCEND_V1, GOLDEN_STICK): lambda found: from_ascend_v1(found.tensors, found.kinds),
    (GOLDEN_STICK, ASCEND_V1): lambda found: to_ascend_v1(found.tensors, found.packed),
    ("autogptq", GOLDEN_STICK): partial(_int4, read_autogptq),
    ("autogptq_v2", GOLDEN_STICK): partial(_int4, partial(read_autogptq, version=2)),
    ("autoawq", GOLDEN_STICK): partial(_int4, read_autoawq),
}


def convert(source: Path, out: Path, from_: str, to: str) -> list[Path]:
    """Write ``source`` in another format and return the files written.

    ``source``: for ascend_v1 the description (.json), else a .safetensors file or a folder of them. ``out``: for
    ascend_v1 a folder, else a .safetensors file. Raises RecipeError for a pair that there is not, GraphError for
    files that cannot be read, do not fit the format, or cannot be written.
    """
    change = CONVERSIONS.get((from_, to))
    if change is None:
        known = ", ".join(f"{a} to {b}" for a, b in CONVERSIONS)
        raise RecipeError(f"convert: there is no way from '{from_}' to '{to}'; there are {known}")
    found = _read(source, from_)
    made = change(found)
    if isinstance(made, TensorSet):
        return _write(out, files_of(made, WeightFiles(("ascendV1",))), found.files)
    if out.suffix != ".safetensors":
        raise GraphError(f"output '{out}' must end in .safetensors for {to}")
    packed = {} if from_ == ASCEND_V1 else {name: "int4" for name in made if name.endswith(WEIGHT)}
    return write_tensors(out, made, found.files, tell_packed(packed) if packed else None)


def write_tensors(
    out: Path,
    tensors: Mapping[str, Array],
    sources: Sequence[Path] = (),
    metadata: dict[str, str] | None = None,
) -> list[Path]:
    """One .safetensors file, atomically; GraphError when it would replace one of ``sources`` or the disk refuses."""
    plain = {
        name: np.ascontiguousarray(values).reshape(values.shape) for name, values in sorted(tensors.items())
    }

    def write(path: Path) -> None:
        with create(path) as file:
            file.write(save(plain, metadata=metadata))

    return _write(out.parent, {out.name: write}, sources)


def _write(folder: Path, files: Mapping[str, Write], sources: Sequence[Path]) -> list[Path]:
    """All files appear together; the model file that such a set of paths begins with is never written."""
    paths = output_paths(folder / ".none.onnx", "", "", tuple(files))
    with AtomicFiles(paths, sources) as out:
        for path in out.temporary.others:
            files[path.name](path)
        out.commit()
    return [folder / name for name in files]


def _read(source: Path, form: str) -> Checkpoint:
    if form == ASCEND_V1:
        if source.suffix != ".json":
            raise GraphError(f"'{source}': give the description, quant_model_description….json")
        tensors, kinds = read_weight_files(source)
        return Checkpoint(tensors, (source, *tensor_files(source)), kinds)
    paths = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not paths:
        raise GraphError(f"'{source}' holds no .safetensors file")
    every: dict[str, Array] = {}
    packed: frozenset[str] = frozenset()
    for path in paths:
        found, metadata = read_tensors(path)
        every |= found
        try:
            packed |= read_packed(metadata).keys()
        except ValueError as error:
            raise GraphError(f"'{path}': {error}") from None
    return Checkpoint(every, tuple(paths), packed=packed)
