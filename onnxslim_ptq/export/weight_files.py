"""Tensors and their description on disk, named, divided and protected as msModelSlim does it.

| save type | files |
|---|---|
| safe_tensor | ``quant_model_weight_<type>.safetensors``, ``quant_model_description_<type>.json`` |
| ascendV1 | the same tensors; ``quant_model_description.json``, which also holds ``version`` |
| numpy | one .npz per kind of tensor (``deq_scale.npz``, …), arrays by layer name |

With a limit the tensors go to ``<stem>-00001-of-0000N.safetensors`` and ``<stem>.safetensors.index.json``.
msModelSlim's numpy files are pickled dictionaries under these names with the suffix .npy; pickle is not written here.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from calib.types import Array
from onnxslim_ptq.export.files import create
from onnxslim_ptq.export.tensors import TensorSet

__all__ = ["SAVE_TYPES", "WeightFiles", "Write", "files_of"]

SAVE_TYPES = ("safe_tensor", "numpy", "ascendV1")
_SECRET_TENSORS, _SECRET_JSON = 0o400, 0o600
_NUMPY_KINDS = {
    "weight": "quant_weight",
    "weight_scale": "weight_scale",
    "weight_offset": "weight_offset",
    "input_scale": "input_scale",
    "input_offset": "input_offset",
    "quant_bias": "quant_bias",
    "deq_scale": "deq_scale",
}
Write = Callable[[Path], None]


@dataclass(frozen=True)
class WeightFiles:
    """What is written beside a model. ``part_bytes``: a shard that would exceed it is closed before (None: one file).

    Names are file names without folder; None: msModelSlim's. ValueError naming the field otherwise.
    """

    save_type: tuple[str, ...] = ("safe_tensor",)
    safetensors_name: str | None = None
    json_name: str | None = None
    part_bytes: int | None = None

    def __post_init__(self) -> None:
        for kind in self.save_type:
            if kind not in SAVE_TYPES:
                raise ValueError(f"save_type: {kind!r} is unknown; use {', '.join(SAVE_TYPES)}")
        if not self.save_type:
            raise ValueError(f"save_type: is empty; use {', '.join(SAVE_TYPES)}")
        for key, suffix in (("safetensors_name", ".safetensors"), ("json_name", ".json")):
            name = getattr(self, key)
            if name is not None and (Path(name).name != name or not name.endswith(suffix)):
                raise ValueError(f"{key}: {name!r} is no file name ending in {suffix}")
        if self.part_bytes is not None and self.part_bytes < 1:
            raise ValueError("part_file_size: must be at least 1")


def files_of(made: TensorSet, how: WeightFiles) -> dict[str, Write]:
    """For each file name, what writes that file into a folder path it is given; tensors before what refers to them."""
    files: dict[str, Write] = {}
    # msModelSlim ignores the other types beside ascendV1, which holds the same tensors.
    kinds = ("ascendV1",) if "ascendV1" in how.save_type else how.save_type
    if "numpy" in kinds:
        files |= _numpy_files(made)
    if {"safe_tensor", "ascendV1"} & set(kinds):
        files |= _tensor_files(made, how)
        files |= _description(made, how, versioned="ascendV1" in kinds)
    return files


def _tensor_files(made: TensorSet, how: WeightFiles) -> dict[str, Write]:
    name = how.safetensors_name or f"quant_model_weight_{made.quant_type.lower()}.safetensors"
    metadata = None if made.steps is None else made.steps.metadata()
    if how.part_bytes is None:
        return {name: _saving(made.tensors, metadata)}
    stem = name.removesuffix(".safetensors")
    shards = _shards(made.tensors, how.part_bytes)
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    where = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(values.nbytes for values in made.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    return {
        **{file: _saving(shard, metadata) for file, shard in zip(names, shards, strict=True)},
        f"{stem}.safetensors.index.json": _dumping(index),
    }


def _shards(tensors: Mapping[str, Array], limit: int) -> list[dict[str, Array]]:
    """In order; a shard is closed before the tensor that would bring it to ``limit`` bytes."""
    shards: list[dict[str, Array]] = [{}]
    size = 0
    for name, values in tensors.items():
        if shards[-1] and size + values.nbytes >= limit:
            shards.append({})
            size = 0
        shards[-1][name] = values
        size += values.nbytes
    return shards


def _description(made: TensorSet, how: WeightFiles, *, versioned: bool) -> dict[str, Write]:
    usual = "quant_model_description" + ("" if versioned else f"_{made.quant_type.lower()}") + ".json"
    head = {"model_quant_type": made.quant_type, **({"version": "1.0.0"} if versioned else {})}
    return {how.json_name or usual: _dumping({**head, **made.facts, **made.kinds})}


def _numpy_files(made: TensorSet) -> dict[str, Write]:
    tables: dict[str, dict[str, Array]] = {}
    for name, values in made.tensors.items():
        layer, _, part = name.rpartition(".")
        if part in _NUMPY_KINDS and f"{layer}.weight_scale" in made.tensors:
            tables.setdefault(_NUMPY_KINDS[part], {})[layer] = values
    return {f"{kind}.npz": _zipping(table) for kind, table in sorted(tables.items())}


def _saving(tensors: Mapping[str, Array], metadata: dict[str, str] | None) -> Write:
    def write(path: Path) -> None:
        with create(path):  # refuses in words what the disk refuses
            pass
        save_file({name: tensors[name] for name in sorted(tensors)}, path, metadata)
        path.chmod(_SECRET_TENSORS)

    return write


def _dumping(document: Any) -> Write:
    def write(path: Path) -> None:
        with create(path) as file:
            file.write((json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
        path.chmod(_SECRET_JSON)

    return write


def _zipping(arrays: Mapping[str, Array]) -> Write:
    def write(path: Path) -> None:
        # numpy.savez would take no layer called "file".
        with create(path) as file, zipfile.ZipFile(file, "w") as archive:
            for name in sorted(arrays):
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, arrays[name], allow_pickle=False)
        os.chmod(path, _SECRET_JSON)

    return write
