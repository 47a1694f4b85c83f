"""Calibration images as msModelSlim's two preprocessors prepare them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calib.readers.images import decode_image
from calib.readers.limits import DEFAULT_LIMITS
from calib.readers.preprocess import PRESETS, to_tensor
from onnxslim_ptq.frontends.checks import require_int

__all__ = ["coco", "imagenet"]

_SUFFIXES = (".jpg", ".jpeg", ".png")
Batches = list[NDArray[np.float32]]


def imagenet(
    image_folder: str | os.PathLike[str], height: int = 224, width: int = 224, batch_size: int = 1
) -> Batches:
    """RGB images, resized, (x / 255 - mean) / std with ImageNet's numbers, as float32 [batch, 3, height, width].

    ValueError when the folder holds fewer images than a batch, CalibrationError for a file that is no image or is too
    large. A remainder is dropped; order is by name.
    """
    return _batches("imagenet", image_folder, height, width, batch_size)


def coco(
    image_folder: str | os.PathLike[str], height: int = 320, width: int = 320, batch_size: int = 1
) -> Batches:
    """RGB images, resized, x / 255, as float32 [batch, 3, height, width]; errors as `imagenet`."""
    return _batches("coco", image_folder, height, width, batch_size)


def _batches(preset: str, folder: str | os.PathLike[str], height: int, width: int, size: int) -> Batches:
    for name, value in (("height", height), ("width", width), ("batch_size", size)):
        require_int(name, value, 1)
    how = replace(PRESETS[preset], size=(height, width), channels="rgb", layout="nchw")
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder; give the folder that holds the calibration images.")
    paths = sorted(path for path in place.iterdir() if path.suffix.lower() in _SUFFIXES)
    if len(paths) < size:
        raise ValueError(
            "The number of calibrated images is smaller than the batch size, please add some pictures."
        )
    whole = paths[: len(paths) // size * size]
    images = [to_tensor(decode_image(path, DEFAULT_LIMITS), how) for path in whole]
    return [np.concatenate(images[at : at + size]) for at in range(0, len(images), size)]
