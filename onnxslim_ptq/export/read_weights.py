"""Reads weight files, of which nothing is known before: .safetensors files, and the saves of `weight_files`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from calib.types import Array
from onnxslim_ptq.core.timesteps import CalibratedSteps
from onnxslim_ptq.errors import GraphError

__all__ = ["read_steps", "read_tensors", "read_weight_files", "tensor_files"]

_MAX_JSON = 256 * 1024**2
_FACTS = ("model_quant_type", "version", "fa_quant_type", "group_size")
Tensors = dict[str, Array]


def read_tensors(path: Path, wanted: Collection[str] | None = None) -> tuple[Tensors, dict[str, str]]:
    """The tensors of one .safetensors file (those among ``wanted``), and its metadata.

    Raises:
        GraphError: it is no such file, or numpy has no type for a tensor's.
    """
    try:
        with safe_open(str(path), "np") as file:
            names = [name for name in sorted(file.keys()) if wanted is None or name in wanted]
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (OSError, SafetensorError, TypeError, ValueError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise GraphError(f"'{path}' cannot be read as safetensors ({why}); check the path") from None


def read_weight_files(description: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors by name and their kinds, from a description and the .safetensors files of the same save beside it.

    Those are the ones with the usual name of the description's type; where there are none, all.

    Raises:
        GraphError: a file is no such file, two hold the same tensor, or one that the description names is missing.
    """
    document = _description(description)
    tensors: Tensors = {}
    held: dict[str, Path] = {}
    for path in _beside(description, document):
        found, _ = read_tensors(path, document)
        twice = next((name for name in found if name in held), None)
        if twice is not None:
            raise GraphError(
                f"tensor '{twice}' is in '{held[twice].name}' and in '{path.name}'; keep one save in a folder"
            )
        tensors |= found
        held |= dict.fromkeys(found, path)
    for name, kind in document.items():
        if name in tensors and not isinstance(kind, str):
            raise GraphError(
                f"'{description.name}' gives the tensor '{name}' the kind {kind!r}, which is no text"
            )
        if name not in tensors and name not in _FACTS:
            raise GraphError(
                f"'{description.name}' names the tensor '{name}', which no .safetensors beside it holds"
            )
    return tensors, {name: document[name] for name in tensors}


def read_steps(description: Path) -> CalibratedSteps | None:
    """The time steps that the rows of W8A8_TIMESTEP tensors are of, None where the files beside ``description`` do not
    tell; raises GraphError as `read_weight_files` does."""
    for path in tensor_files(description):
        _, metadata = read_tensors(path, ())
        try:
            steps = CalibratedSteps.read(metadata)
        except ValueError as error:
            raise GraphError(f"'{path}' is damaged: {error}") from None
        if steps is not None:
            return steps
    return None


def tensor_files(description: Path) -> list[Path]:
    """The .safetensors files that `read_weight_files` reads; raises GraphError as it does."""
    return _beside(description, _description(description))


def _description(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise GraphError(f"'{path}' is larger than a description can be")
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GraphError(f"description '{path}' cannot be read: {error}") from None
    if not isinstance(document, dict) or "model_quant_type" not in document:
        raise GraphError(f"'{path}' is no description of quantized weights: it has no model_quant_type")
    return document


def _beside(description: Path, document: dict[str, Any]) -> list[Path]:
    quant_type = re.escape(str(document["model_quant_type"]).lower())
    usual = re.compile(rf"quant_model_weight_{quant_type}(-\d+-of-\d+)?\.safetensors", re.ASCII)
    # <model>.params.safetensors holds arrays of the weights JSON.
    every = [
        p for p in description.parent.glob("*.safetensors") if not p.name.endswith(".params.safetensors")
    ]
    return sorted([path for path in every if usual.fullmatch(path.name)] or every)
