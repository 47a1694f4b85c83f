"""Weight files of one tool as those of another: which pairs there are, reading, writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from calib.types import Array
from onnxslim_ptq.errors import GraphError, RecipeError
from onnxslim_ptq.export.files import AtomicFiles, create, output_paths
from onnxslim_ptq.export.golden_stick import from_ascend_v1, from_int4, to_ascend_v1
from onnxslim_ptq.export.packed_int4 import Read, read_autoawq, read_autogptq
from onnxslim_ptq.export.rebuild import read_weight_files
from onnxslim_ptq.export.tensors import TensorSet
from onnxslim_ptq.export.weight_files import WeightFiles, Write, files_of

__all__ = ["CONVERSIONS", "convert", "write_tensors"]

ASCEND_V1, GOLDEN_STICK = "ascend_v1", "golden_stick"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name; ``kinds`` where a description tells them."""

    tensors: Mapping[str, Array]
    kinds: Mapping[str, str]


def _int4(read: Callable[[Mapping[str, Array]], Read], checkpoint: Checkpoint) -> Mapping[str, Array]:
    return from_int4(*read(checkpoint.tensors))


# (from, to) -> the tensors in their new form; TensorSet where they have kinds.
CONVERSIONS: dict[tuple[str, str], Callable[[Checkpoint], Mapping[str, Array] | TensorSet]] = {
    (ASCEND_V1, GOLDEN_STICK): lambda found: from_ascend_v1(found.tensors, found.kinds),
    (GOLDEN_STICK, ASCEND_V1): lambda found: to_ascend_v1(found.tensors),
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
    made = change(_read(source, from_))
    if isinstance(made, TensorSet):
        return _write(out, files_of(made, WeightFiles(("ascendV1",))), source)
    if out.suffix != ".safetensors":
        raise GraphError(f"output '{out}' must end in .safetensors for {to}")
    return write_tensors(out, made, source)


def write_tensors(
    out: Path,
    tensors: Mapping[str, Array],
    source: Path | None = None,
    metadata: dict[str, str] | None = None,
) -> list[Path]:
    """One .safetensors file, atomically; GraphError when it would replace ``source`` or the disk refuses."""
    plain = {
        name: np.ascontiguousarray(values).reshape(values.shape) for name, values in sorted(tensors.items())
    }

    def write(path: Path) -> None:
        with create(path) as file:
            file.write(save(plain, metadata=metadata))

    return _write(out.parent, {out.name: write}, source)


def _write(folder: Path, files: Mapping[str, Write], source: Path | None) -> list[Path]:
    """All files appear together; the model file that such a set of paths begins with is never written."""
    paths = output_paths(folder / ".none.onnx", "", "", tuple(files))
    with AtomicFiles(paths, [] if source is None or source.is_dir() else [source]) as out:
        for path in out.temporary.others:
            files[path.name](path)
        out.commit()
    return [folder / name for name in files]


def _read(source: Path, form: str) -> Checkpoint:
    if form == ASCEND_V1:
        if source.suffix != ".json":
            raise GraphError(f"'{source}': give the description, quant_model_description….json")
        return Checkpoint(*read_weight_files(source))
    paths = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not paths:
        raise GraphError(f"'{source}' holds no .safetensors file")
    tensors: dict[str, Array] = {}
    for path in paths:
        try:
            with safe_open(str(path), "np") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError, AttributeError) as error:
            raise GraphError(f"'{path}' cannot be read: {' '.join(str(error).split())}") from None
    return Checkpoint(tensors, {})
