"""From a decoded image to the tensor a model was trained on: geometry by Pillow, arithmetic in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from calib.types import InputInfo

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PRESETS", "Channels", "Fit", "ImagePreprocess", "Layout", "Resampling", "for_input", "to_tensor"]

Fit = Literal["stretch", "crop", "pad"]
Resampling = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Channels = Literal["auto", "rgb", "bgr", "gray"]
Layout = Literal["auto", "nchw", "nhwc"]

_POINTWISE = ("nearest", "bilinear")
_MOST_PIXELS = 1 << 27  # of an image scaled to be cropped: a very long one would become huge


@dataclass(frozen=True)
class ImagePreprocess:
    """y = (scale * x - mean) / std per channel, x in 0..255, after the image was brought to ``size``.

    ``size`` is (height, width); None takes the model's fixed size, or leaves images as they are. ``fit``:
    ``stretch`` ignores the aspect; ``crop`` scales the shorter side to size / ``crop_fraction`` and cuts out the
    centre (as torchvision's Resize and CenterCrop); ``pad`` scales the whole image in and fills with ``pad_value``.
    ``antialias`` False interpolates between source pixels only, which is what cv2.resize does. ``channels`` auto
    is gray for a one-channel input, else rgb; ``layout`` auto follows the model's input shape.

    ValueError as "field: …" for a value that cannot be.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    fit: Fit = "stretch"
    crop_fraction: float = 0.875
    pad_value: int = 0
    resize: Resampling = "bilinear"
    antialias: bool = True
    channels: Channels = "auto"
    layout: Layout = "auto"

    def __post_init__(self) -> None:
        numbers = {"scale": (self.scale,), "mean": self.mean, "std": self.std}
        for name, values in numbers.items():
            if len(values) not in (1, 3) or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name}: give one finite number, or one for each of 3 channels")
        if not all((self.scale > 0, *(value > 0 for value in self.std))):
            raise ValueError(f"{'scale' if self.scale <= 0 else 'std'}: must be above 0")
        if self.size is not None and not all(0 < side <= 1 << 14 for side in self.size):
            raise ValueError(f"size: give height and width from 1 to {1 << 14}")
        if not 0.1 <= self.crop_fraction <= 1:
            raise ValueError("crop_fraction: must be from 0.1 to 1")
        if not 0 <= self.pad_value <= 255:
            raise ValueError("pad_value: must be from 0 to 255")
        if not self.antialias and self.resize not in _POINTWISE:
            raise ValueError(f"antialias: false goes with resize {' or '.join(_POINTWISE)} only")

    def __str__(self) -> str:
        """What is done, in the order in which it is done."""
        parts = []
        if self.size is not None:
            how = {"stretch": "stretched", "crop": f"centre {self.crop_fraction:g}", "pad": "padded"}[
                self.fit
            ]
            plain = "" if self.antialias else ", no antialias"
            parts.append(f"{how} to {self.size[0]}x{self.size[1]} ({self.resize}{plain})")
        parts += [self.channels.upper(), self.layout.upper()]
        parts.append(f"(x * {self.scale:.6g} - {_text(self.mean)}) / {_text(self.std)}")
        return ", ".join(parts)


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# As msModelSlim's preprocess_func_imagenet and preprocess_func_coco: cv2.resize to the whole size, RGB.
PRESETS: dict[str, ImagePreprocess] = {
    "imagenet": ImagePreprocess(1 / 255, _IMAGENET_MEAN, _IMAGENET_STD, (224, 224), antialias=False),
    "coco": ImagePreprocess(1 / 255, size=(320, 320), antialias=False),
    "none": ImagePreprocess(),
}


def _text(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"[{', '.join(f'{value:g}' for value in values)}]"


def for_input(
    wanted: ImagePreprocess, info: InputInfo, given: frozenset[str] = frozenset()
) -> tuple[ImagePreprocess, list[str]]:
    """``wanted`` with layout, channels and size as the model's input has them, and what was decided for the user.

    ``given`` names the fields the user set himself: a size among them must be the model's, a preset's gives way.

    Raises:
        ValueError: "field: …", the input takes no images, or layout and shape contradict each other.
    """
    rank = None if info.shape is None else len(info.shape)
    if rank not in (None, 3, 4):
        raise ValueError(f"input: '{info.name}' has rank {rank}, no image (rank 3 or 4); name another input")
    said: list[str] = []
    layout = wanted.layout
    if layout == "auto":
        layout = _guess_layout(info)
        said.append(f"layout {layout.upper()} guessed from the shape of input '{info.name}'")
    count, height, width = _declared(info, layout)
    channels = wanted.channels
    if channels == "auto":
        channels = "gray" if count == 1 else "rgb"
    if count is not None and count != (1 if channels == "gray" else 3):
        raise ValueError(
            f"channels: input '{info.name}' wants {count} channels as {layout.upper()}, {channels} has "
            f"{1 if channels == 'gray' else 3}; set channels or layout"
        )
    size = wanted.size
    if height is not None and width is not None and size != (height, width):
        if size is not None and "size" in given:
            raise ValueError(
                f"size: is {size[0]}x{size[1]}, but the model wants {height}x{width}; leave it out"
            )
        if size is not None:
            said.append(f"size {height}x{width} as the model wants, not {size[0]}x{size[1]}")
        size = (height, width)
    resolved = replace(wanted, layout=layout, channels=channels, size=size)
    if channels == "gray" and max(len(resolved.mean), len(resolved.std)) > 1:
        raise ValueError("mean: has 3 values, but the input has one channel; give one")
    return resolved, said


def _guess_layout(info: InputInfo) -> Layout:
    shape = info.shape or ()
    first, last = (shape[-3], shape[-1]) if len(shape) >= 3 else (None, None)
    if first in (1, 3) and last not in (1, 3):
        return "nchw"
    if last in (1, 3) and first not in (1, 3):
        return "nhwc"
    raise ValueError(f"layout: cannot be told from the shape of input '{info.name}'; give nchw or nhwc")


def _declared(info: InputInfo, layout: Layout) -> tuple[int | None, int | None, int | None]:
    """Channels, height and width that the model fixes."""
    if info.shape is None:
        return None, None, None
    sizes = [size if isinstance(size, int) else None for size in info.shape[-3:]]
    first, second, third = sizes
    return (first, second, third) if layout == "nchw" else (third, first, second)


def to_tensor(image: Image, how: ImagePreprocess, rank: int = 4) -> NDArray[np.float32]:
    """The float32 tensor of one image: [1, C, H, W] or [1, H, W, C], without the leading axis at rank 3.

    ValueError as "field: …" when the image is too long to be cropped.
    """
    ready = _fitted(image.convert("L" if how.channels == "gray" else "RGB"), how)
    pixels = np.asarray(ready, np.float32)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if how.channels == "bgr":
        pixels = pixels[:, :, ::-1]
    values = pixels * np.float32(how.scale)
    values -= np.asarray(how.mean, np.float32)
    values /= np.asarray(how.std, np.float32)
    if how.layout == "nchw":
        values = values.transpose(2, 0, 1)
    result: NDArray[np.float32] = np.ascontiguousarray(values[None] if rank == 4 else values, np.float32)
    return result


def _fitted(image: Image, how: ImagePreprocess) -> Image:
    from PIL import Image as pil

    if how.size is None:
        return image
    height, width = how.size
    if how.fit == "stretch":
        return _resized(image, width, height, how)
    if how.fit == "crop":
        tall, wide = _covering(image.height, image.width, *(round(s / how.crop_fraction) for s in how.size))
        if tall * wide > _MOST_PIXELS:
            raise ValueError(f"fit: crop would scale it to {wide}x{tall} before it cuts; use stretch or pad")
        left, top = round((wide - width) / 2), round((tall - height) / 2)
        return _resized(image, wide, tall, how).crop((left, top, left + width, top + height))
    share = min(height / image.height, width / image.width)
    tall, wide = max(1, round(image.height * share)), max(1, round(image.width * share))
    filled = pil.new(image.mode, (width, height), (how.pad_value,) * len(image.getbands()))
    filled.paste(_resized(image, wide, tall, how), ((width - wide) // 2, (height - tall) // 2))
    return filled


def _covering(height: int, width: int, least_height: int, least_width: int) -> tuple[int, int]:
    """The smallest size of that aspect that covers the rectangle; the longer side rounded down, as torchvision."""
    if height * least_width <= width * least_height:
        return least_height, max(least_width, least_height * width // height)
    return max(least_height, least_width * height // width), least_width


def _resized(image: Image, width: int, height: int, how: ImagePreprocess) -> Image:
    from PIL import Image as pil

    method = pil.Resampling[how.resize.upper()]
    if (width, height) == image.size:
        return image
    if how.antialias or method is pil.Resampling.NEAREST:
        return image.resize((width, height), method)
    return pil.fromarray(_between_pixels(np.asarray(image), height, width))


def _between_pixels(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Bilinear between the nearest source pixels, however much it shrinks: Pillow's resize averages instead.

    Output pixel i reads source position (i + 0.5) * source / size - 0.5, clamped to the image, as cv2.INTER_LINEAR.
    """
    (top, bottom, down), (left, right, across) = (
        _neighbours(*sizes) for sizes in ((pixels.shape[0], height), (pixels.shape[1], width))
    )
    tail = (1,) * (pixels.ndim - 2)
    across, down = across.reshape(1, -1, *tail), down.reshape(-1, 1, *tail)
    rows = [pixels[line][:, left] * (1 - across) + pixels[line][:, right] * across for line in (top, bottom)]
    return np.floor(rows[0] * (1 - down) + rows[1] * down + 0.5).astype(np.uint8)


def _neighbours(source: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Per output position: the source positions before and after it, and the share of the latter."""
    place = np.clip((np.arange(size) + 0.5) * (source / size) - 0.5, 0, source - 1)
    before = np.floor(place).astype(np.intp)
    return before, np.minimum(before + 1, source - 1), (place - before).astype(np.float32)
