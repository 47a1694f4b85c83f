"""Refuses before long work what would be refused after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from calib import devices
from onnxslim_ptq.commands.console import warn
from onnxslim_ptq.errors import DeviceError, QuantizationError

if TYPE_CHECKING:
    from onnxslim_ptq.asked import Asked

__all__ = ["require_device_name", "require_page", "require_place", "require_samples", "warn_without_data"]

_PAGE = (".html", ".htm")


def require_place(model: Path, out: Path, device: str, quant_type: str) -> None:
    """DeviceError for a device that is absent, GraphError where OUT is the input or cannot be written."""
    from calib.provider import require_device
    from onnxslim_ptq.export.check import source_files
    from onnxslim_ptq.export.files import AtomicFiles, output_paths

    require_device(device)
    if model.is_file():  # else opening it says what is wrong
        with AtomicFiles(output_paths(out, model.stem, quant_type), source_files(model)):
            pass


def require_page(path: Path) -> None:
    """QuantizationError where a report cannot be written; its suffix keeps it from replacing a model or samples."""
    if path.suffix.lower() not in _PAGE:
        raise QuantizationError(f"--report '{path}': give a name that ends in .html")
    folder = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    if path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise QuantizationError(f"--report '{path}' cannot be written; choose a file in a folder of yours")


def require_device_name(text: str) -> None:
    """QuantizationError for a device that is misspelt: a wrong argument, not one that is absent."""
    try:
        devices.Device.parse(text)
    except DeviceError as error:
        raise QuantizationError(f"--device: {error}") from None


def warn_without_data(model: Path, asked: Asked) -> None:
    """Say plainly that ranges will come from random numbers, where they will."""
    from onnxslim_ptq.recipe import Recipe

    recipe = Recipe.load(asked.recipe)
    given = asked.calib_data is not None or recipe.data.sets or asked.stats is not None
    if not given and recipe.needs_ranges and model.is_file():
        warn(
            "no --calib: activation ranges come from synthetic samples (random numbers), not from real data; "
            "accuracy on real inputs is unknown"
        )


def require_samples(stacked: bool, *files: object) -> None:
    """QuantizationError where --stacked would be ignored in silence, as no file is given that it describes."""
    if stacked and not any(files):
        raise QuantizationError("--stacked describes the files of --calib or --eval; give one of them")
