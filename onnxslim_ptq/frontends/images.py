"""Calibration images as msModelSlim's two preprocessors prepare them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import CalibrationError
from onnxslim_ptq.frontends.checks import require_int

__all__ = ["coco", "imagenet"]

_SUFFIXES = (".jpg", ".jpeg", ".png")
_MEAN = np.asarray([123.675, 116.28, 103.53], np.float32)
_STD = np.asarray([58.395, 57.12, 57.375], np.float32)
Batches = list[NDArray[np.float32]]


def imagenet(
    image_folder: str | os.PathLike[str], height: int = 224, width: int = 224, batch_size: int = 1
) -> Batches:
    """RGB images, resized, (x - mean) / std with ImageNet's numbers, as float32 [batch, 3, height, width].

    ValueError when the folder holds fewer images than a batch. A remainder is dropped; order is by name.
    """
    return _batches(image_folder, height, width, batch_size, lambda x: (x - _MEAN) / _STD)


def coco(
    image_folder: str | os.PathLike[str], height: int = 320, width: int = 320, batch_size: int = 1
) -> Batches:
    """RGB images, resized, x / 255, as float32 [batch, 3, height, width]; ValueError as `imagenet`."""
    return _batches(image_folder, height, width, batch_size, lambda x: x / np.float32(255))


def _batches(folder: str | os.PathLike[str], height: int, width: int, size: int, scaled: Any) -> Batches:
    for name, value in (("height", height), ("width", width), ("batch_size", size)):
        require_int(name, value, 1)
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder; give the folder that holds the calibration images.")
    paths = sorted(path for path in place.iterdir() if path.suffix.lower() in _SUFFIXES)
    if len(paths) < size:
        raise ValueError(
            "The number of calibrated images is smaller than the batch size, please add some pictures."
        )
    images = [_read(path, height, width) for path in paths[: len(paths) // size * size]]
    planes = [np.ascontiguousarray(scaled(image).transpose(2, 0, 1), np.float32) for image in images]
    return [np.stack(planes[at : at + size]) for at in range(0, len(planes), size)]


def _read(path: Path, height: int, width: int) -> NDArray[np.float32]:
    """Bilinear without antialiasing, as cv2.resize: pixel centres, edges repeated."""
    try:
        from PIL import Image
    except ImportError:
        raise CalibrationError("images need Pillow; install the extra [images]") from None
    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"), np.float32)
    except OSError as error:
        raise ValueError(f"{path} is not a readable image ({error}).") from None
    return _resized(_resized(pixels, height, 0), width, 1)


def _resized(pixels: NDArray[np.float32], size: int, axis: int) -> NDArray[np.float32]:
    old = pixels.shape[axis]
    at = (np.arange(size) + 0.5) * old / size - 0.5
    low = np.floor(at)
    share = (at - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
    first, second = (np.clip(low + k, 0, old - 1).astype(np.intp) for k in (0, 1))
    return np.asarray(pixels.take(first, axis) * (1 - share) + pixels.take(second, axis) * share, np.float32)
