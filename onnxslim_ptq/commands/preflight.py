"""Refuses before long work what would be refused after it."""

from __future__ import annotations

import os
from pathlib import Path

from onnxslim_ptq.errors import QuantizationError

__all__ = ["require_page", "require_place", "require_samples"]

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


def require_samples(stacked: bool, *files: object) -> None:
    """QuantizationError where --stacked would be ignored in silence, as no file is given that it describes."""
    if stacked and not any(files):
        raise QuantizationError("--stacked describes the files of --calib or --eval; give one of them")
