"""Samples from image files: opened by Pillow after their size was judged, one in memory at a time."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.errors import CalibrationError
from calib.readers.access import Selectable
from calib.readers.check import check_feed
from calib.readers.limits import ReadLimits, label, place_of, quoted
from calib.readers.preprocess import PRESETS, ImagePreprocess, for_input, to_tensor
from calib.types import Array, Dataset, InputInfo, Sample, SampleId

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGE_SUFFIXES", "decode_image", "open_images"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm")
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM")  # nothing else is tried, whatever the file says
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def open_images(
    files: Sequence[Path],
    inputs: Sequence[InputInfo],
    how: ImagePreprocess | None,
    given: frozenset[str],
    limits: ReadLimits,
    said: list[str],
) -> Dataset:
    """One sample per image, preprocessed by ``how``; ``said`` gets a line that tells how.

    Raises:
        CalibrationError: Pillow is missing, no preprocessing was given, or it does not fit the model's input.
    """
    where = label(files[0])
    if how is None:
        raise CalibrationError(
            f"{where}: an image needs the preprocessing of the model's training; give --preprocess "
            f"{' or '.join(PRESETS)}, or mean, std and size under data.preprocess in the recipe"
        )
    if len(inputs) != 1:
        raise CalibrationError(
            f"{where}: an image serves one input, the model has {quoted(i.name for i in inputs)}; "
            "give the others as data.constants, or save .npz files"
        )
    _pillow(where)
    info = inputs[0]
    if (
        info.shape
        and len(info.shape) == 4
        and info.shape[0] not in (1, None)
        and isinstance(info.shape[0], int)
    ):
        raise CalibrationError(
            f"{where}: input '{info.name}' wants batches of {info.shape[0]}; export the model with a "
            "dynamic batch, or save .npz files"
        )
    try:
        resolved, decided = for_input(how, info, given)
    except ValueError as error:
        raise CalibrationError(f"data.preprocess.{error}") from None
    height, width = resolved.size or (0, 0)
    limits.check_bytes(height * width * 3 * 4, "data.preprocess.size", "give a smaller size")
    said.append("; ".join([f"{len(files)} images from {place_of(files)}: {resolved}", *decided]))
    return _ImageDataset(tuple(files), info, resolved, limits)


def _pillow(where: str) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise CalibrationError(
            f"{where}: reading images needs Pillow; pip install 'onnxslim_ptq[images]'"
        ) from None
    return Image


@dataclass(frozen=True)
class _ImageDataset(Selectable):
    files: tuple[Path, ...]
    info: InputInfo
    how: ImagePreprocess
    limits: ReadLimits

    def __len__(self) -> int:
        return len(self.files)

    def read(self, positions: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ``positions``; other files are not opened."""
        for position in positions:
            path = self.files[position]
            rank = 4 if self.info.shape is None else len(self.info.shape)
            image = decode_image(path, self.limits)
            try:
                values = to_tensor(image, self.how, rank)
            except ValueError as error:
                raise CalibrationError(f"{label(path)}: data.preprocess.{error}") from None
            tensor = _as(values, self.info, label(path))
            feed = check_feed({self.info.name: tensor}, (self.info,), label(path), "")
            yield SampleId(position, path.name), feed


def decode_image(path: Path, limits: ReadLimits) -> Image:
    """The image upright, decoded only after its header promised an acceptable size; CalibrationError otherwise."""
    from PIL import ImageOps

    pil, where = _pillow(label(path)), label(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CalibrationError(f"{where}: not a regular file; pass image files")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is judged below, damage is an error
            with pil.open(path, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > limits.max_image_pixels:
                    raise CalibrationError(
                        f"{where}: has {width}x{height} pixels, more than {limits.max_image_pixels:,}; shrink it"
                    )
                if image.mode in _DEEP:
                    raise CalibrationError(
                        f"{where}: has more than 8 bits a channel ({image.mode}); "
                        "convert it as the model's preprocessing does, or save .npz files"
                    )
                image.load()
                upright: Image = ImageOps.exif_transpose(image)
                return upright
    except CalibrationError:
        raise
    except Exception as error:  # a hostile file gets many classes of error out of the decoders
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise CalibrationError(
            f"{where}: cannot be read as an image ({reason}); remove or convert it"
        ) from None


def _as(values: Array, info: InputInfo, where: str) -> Array:
    """In the input's dtype, integers only where nothing is lost."""
    if info.dtype.kind in "iu":
        integer: Any = info.dtype
        limits, whole = np.iinfo(integer), np.rint(values)
        if not np.array_equal(values, whole) or values.min() < limits.min or values.max() > limits.max:
            raise CalibrationError(
                f"{where}: input '{info.name}' wants {info.dtype}, preprocessing gives fractions or values "
                "beyond it; use --preprocess none"
            )
        return whole.astype(info.dtype)
    return values.astype(info.dtype)
