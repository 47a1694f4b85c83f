"""Image preprocessing against numpy, Pillow and cv2: geometry, arithmetic, layout, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from calib.readers.preprocess import PRESETS, ImagePreprocess, for_input, to_tensor
from calib.types import InputInfo

pil = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (37, 61, 3), dtype=np.uint8)
IMAGE = pil.fromarray(PIXELS)
PLAIN = ImagePreprocess(layout="nchw", channels="rgb")


def info(*shape: int | str | None, dtype: Any = np.float32) -> InputInfo:
    return InputInfo("x", np.dtype(dtype), shape)


class TestArithmetic:
    def test_the_formula(self) -> None:
        """y = (scale * x - mean) / std per channel."""
        how = replace(PLAIN, scale=1 / 255, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
        exact = (PIXELS.astype(np.float64) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
        found = to_tensor(IMAGE, how)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, exact.transpose(2, 0, 1)[None], atol=1e-6)

    def test_layout_channels_and_rank(self) -> None:
        nhwc = to_tensor(IMAGE, replace(PLAIN, layout="nhwc"))
        assert np.array_equal(nhwc[0], PIXELS)
        assert np.array_equal(to_tensor(IMAGE, PLAIN, 3), PIXELS.transpose(2, 0, 1))
        bgr = to_tensor(IMAGE, replace(PLAIN, layout="nhwc", channels="bgr"))
        assert np.array_equal(bgr, nhwc[..., ::-1])
        gray = to_tensor(IMAGE, replace(PLAIN, channels="gray"))
        assert np.array_equal(gray[0, 0], np.asarray(IMAGE.convert("L")))

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
    def test_every_mode_becomes_rgb(self, mode: str) -> None:
        image = IMAGE.convert("RGB" if mode == "LA" else mode).convert(mode)
        assert np.array_equal(to_tensor(image, PLAIN)[0], np.asarray(image.convert("RGB")).transpose(2, 0, 1))

    def test_presets(self) -> None:
        """imagenet as (x - 255 mean) / (255 std) at 224, coco as x / 255 at 320."""
        flat = pil.new("RGB", (50, 50), (124, 116, 104))
        how, _ = for_input(PRESETS["imagenet"], info("n", 3, None, None))
        values = to_tensor(flat, how)
        assert values.shape == (1, 3, 224, 224)
        mean, std = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
        np.testing.assert_allclose(values[0, :, 0, 0], (np.array([124, 116, 104]) - mean) / std, atol=1e-6)
        how, _ = for_input(PRESETS["coco"], info("n", 3, None, None))
        np.testing.assert_allclose(to_tensor(flat, how)[0, :, 0, 0], np.array([124, 116, 104]) / 255)
        assert to_tensor(flat, how).shape == (1, 3, 320, 320)


class TestGeometry:
    @pytest.mark.parametrize("size", [(224, 224), (16, 90), (37, 61), (1, 1)])
    def test_without_antialias_it_is_cv2(self, size: tuple[int, int]) -> None:
        cv2 = pytest.importorskip("cv2")
        found = to_tensor(IMAGE, replace(PLAIN, size=size, antialias=False, layout="nhwc"))[0]
        exact = cv2.resize(PIXELS, size[::-1], interpolation=cv2.INTER_LINEAR)
        assert np.abs(found - exact).max() <= 1  # cv2 computes with 11 bits

    def test_with_antialias_it_is_pillow(self) -> None:
        found = to_tensor(IMAGE, replace(PLAIN, size=(16, 24), resize="bicubic", layout="nhwc"))[0]
        assert np.array_equal(found, np.asarray(IMAGE.resize((24, 16), pil.Resampling.BICUBIC)))

    def test_crop_is_resize_and_center_crop(self) -> None:
        """As torchvision: the shorter side to round(28 / 0.875) = 32, the other one down, the centre of 28."""
        found = to_tensor(IMAGE, replace(PLAIN, size=(28, 28), fit="crop", layout="nhwc"))[0]
        whole = np.asarray(IMAGE.resize((32 * 61 // 37, 32), pil.Resampling.BILINEAR))
        assert np.array_equal(found, whole[2:30, 12:40])  # (52 - 28) / 2 = 12

    def test_pad_keeps_the_aspect(self) -> None:
        found = to_tensor(IMAGE, replace(PLAIN, size=(61, 61), fit="pad", pad_value=114, layout="nhwc"))[0]
        assert np.array_equal(found[12:49], PIXELS)
        assert (found[:12] == 114).all()
        assert (found[49:] == 114).all()

    def test_pad_in_gray(self) -> None:
        found = to_tensor(IMAGE, replace(PLAIN, size=(61, 61), fit="pad", pad_value=9, channels="gray"))[0, 0]
        assert np.array_equal(found[12:49], np.asarray(IMAGE.convert("L")))
        assert (found[:12] == 9).all()

    def test_a_very_long_image_is_not_blown_up(self) -> None:
        long = pil.new("RGB", (1_000_000, 1))
        with pytest.raises(ValueError, match=r"^fit: crop would scale it to 32000000x32"):
            to_tensor(long, replace(PLAIN, size=(28, 28), fit="crop"))
        assert to_tensor(long, replace(PLAIN, size=(28, 28), fit="pad")).shape == (1, 3, 28, 28)

    def test_without_size_images_stay(self) -> None:
        assert to_tensor(IMAGE, PLAIN).shape == (1, 3, 37, 61)


class TestForInput:
    @pytest.mark.parametrize(
        ("shape", "layout", "channels"),
        [
            (("n", 3, None, None), "nchw", "rgb"),
            ((1, 224, 224, 3), "nhwc", "rgb"),
            ((1, 1, 28, 28), "nchw", "gray"),
            ((None, None, 1), "nhwc", "gray"),
        ],
    )
    def test_guesses_and_says_so(self, shape: Any, layout: str, channels: str) -> None:
        how, said = for_input(ImagePreprocess(), info(*shape))
        assert (how.layout, how.channels) == (layout, channels)
        assert said == [f"layout {layout.upper()} guessed from the shape of input 'x'"]

    def test_the_models_size_beats_the_presets(self) -> None:
        how, said = for_input(PRESETS["imagenet"], info(1, 3, 160, 192))
        assert how.size == (160, 192)
        assert "size 160x192 as the model wants, not 224x224" in said

    @pytest.mark.parametrize(
        ("how", "shape", "given", "words"),
        [
            ({}, (1, "c", "h", "w"), (), "layout: cannot be told"),
            ({}, (3, 3, 3), (), "layout: cannot be told"),
            ({}, (1, 10), (), "input: 'x' has rank 2"),
            ({"layout": "nhwc"}, (1, 3, 8, 8), (), "channels: input 'x' wants 8 channels as NHWC"),
            ({"channels": "gray"}, (1, 3, 8, 8), (), "wants 3 channels"),
            ({"size": (9, 9)}, (1, 3, 8, 8), ("size",), "size: is 9x9, but the model wants 8x8"),
            ({"mean": (1.0, 2.0, 3.0)}, (1, 1, 8, 8), (), "mean: has 3 values"),
        ],
    )
    def test_contradictions(self, how: Any, shape: Any, given: Any, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            for_input(ImagePreprocess(**how), info(*shape), frozenset(given))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale", 0.0),
        ("scale", float("nan")),
        ("std", (1.0, 0.0, 1.0)),
        ("mean", (1.0, 2.0)),
        ("size", (0, 5)),
        ("size", (5, 1 << 20)),
        ("crop_fraction", 0.0),
        ("pad_value", 256),
    ],
)
def test_impossible_values(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}: "):
        ImagePreprocess(**{key: value})


def test_no_antialias_goes_with_bilinear_only() -> None:
    with pytest.raises(ValueError, match=r"^antialias: "):
        ImagePreprocess(resize="bicubic", antialias=False)
