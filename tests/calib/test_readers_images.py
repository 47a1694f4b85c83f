"""Image folders as samples: order, what is said, and files that are no images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.errors import CalibrationError
from calib.readers import ReadLimits, fingerprint, open_data, take
from calib.readers.files import HowToRead
from calib.readers.preprocess import PRESETS, ImagePreprocess
from calib.types import Array, Dataset, InputInfo

pil = pytest.importorskip("PIL.Image")
X = InputInfo("x", np.dtype(np.float32), ("n", 3, 8, 8))
HOW = HowToRead(image=ImagePreprocess(scale=1 / 255))


def paint(path: Path, seed: int = 0, shape: tuple[int, ...] = (8, 8, 3)) -> Array:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    pil.fromarray(pixels).save(path)
    return pixels


def opened(path: Path, info: InputInfo = X, how: HowToRead = HOW, **more: Any) -> Dataset:
    return open_data([path], [info], how=how, **more)


def fails(data: Dataset, *parts: str) -> None:
    with pytest.raises(CalibrationError) as error:
        list(data)
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


class TestFolder:
    def test_sorted_by_name(self, tmp_path: Path) -> None:
        exact = {name: paint(tmp_path / name, i) for i, name in enumerate(("b.png", "a.bmp", "c.webp"))}
        (tmp_path / ".hidden").write_bytes(b"")
        said: list[str] = []
        data = opened(tmp_path, said=said)
        assert [str(ident) for ident, _ in data] == ["a.bmp", "b.png", "c.webp"]
        for (ident, feed), (name, pixels) in zip(data, sorted(exact.items())[:2], strict=False):
            assert str(ident) == name
            np.testing.assert_allclose(feed["x"][0], pixels.transpose(2, 0, 1) / 255, atol=1e-7)
        assert said == [
            f"3 images from {tmp_path.name}: stretched to 8x8 (bilinear), RGB, NCHW, (x * 0.00392157 - 0) / 1; "
            "layout NCHW guessed from the shape of input 'x'"
        ]

    def test_reads_again_and_in_part(self, tmp_path: Path) -> None:
        for i in range(5):
            paint(tmp_path / f"{i}.png", i)
        data = opened(tmp_path)
        assert fingerprint(data) == fingerprint(data)
        assert len(opened(tmp_path, limit=2)) == 2
        assert fingerprint(take(data, 2)) == fingerprint(opened(tmp_path, limit=2))
        other = HowToRead(image=ImagePreprocess(scale=1 / 128))
        assert fingerprint(opened(tmp_path, how=other)) != fingerprint(data)

    def test_the_camera_was_turned(self, tmp_path: Path) -> None:
        """Pixels are as a viewer shows them, whatever the EXIF orientation."""
        image = pil.new("RGB", (16, 8))
        image.putpixel((0, 0), (255, 255, 255))
        exif = image.getexif()
        exif[0x0112] = 6  # turned by 90 degrees
        image.save(tmp_path / "a.png", exif=exif)
        free = InputInfo("x", X.dtype, ("n", 3, None, None))
        ((_, feed),) = opened(tmp_path / "a.png", free)
        assert feed["x"].shape == (1, 3, 16, 8)
        assert feed["x"][0, 0, 0, 7] == 1

    def test_integers_and_halves(self, tmp_path: Path) -> None:
        pixels = paint(tmp_path / "a.png")
        raw = HowToRead(image=PRESETS["none"])
        ((_, feed),) = opened(tmp_path, InputInfo("x", np.dtype(np.uint8), (1, 8, 8, 3)), raw)
        assert feed["x"].dtype == np.uint8
        assert np.array_equal(feed["x"][0], pixels)
        ((_, feed),) = opened(tmp_path, InputInfo("x", np.dtype(np.float16), (1, 8, 8, 3)))
        assert feed["x"].dtype == np.float16
        fails(
            opened(tmp_path, InputInfo("x", np.dtype(np.uint8), (1, 8, 8, 3))), "a.png", "wants uint8", "none"
        )


class TestRefused:
    def test_without_preprocessing(self, tmp_path: Path) -> None:
        paint(tmp_path / "a.png")
        with pytest.raises(CalibrationError, match=r"a.png: an image needs the preprocessing"):
            open_data([tmp_path], [X])

    def test_does_not_fit_the_model(self, tmp_path: Path) -> None:
        paint(tmp_path / "a.png")
        for inputs, words in (
            ([X, InputInfo("y", X.dtype, (1,))], "serves one input, the model has 'x', 'y'"),
            ([InputInfo("x", X.dtype, (4, 3, 8, 8))], "wants batches of 4"),
            ([InputInfo("x", X.dtype, (1, 7))], "data.preprocess.input: 'x' has rank 2"),
        ):
            with pytest.raises(CalibrationError, match=words):
                open_data([tmp_path], inputs, how=HOW)

    def test_other_files_in_the_folder(self, tmp_path: Path) -> None:
        paint(tmp_path / "a.png")
        (tmp_path / "labels.txt").write_text("cat")
        with pytest.raises(CalibrationError, match=r"labels.txt: not a sample file like 'a.png'"):
            opened(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a\x01\x00\x01\x00"])
    def test_no_image(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.png").write_bytes(content)
        fails(opened(tmp_path), "a.png: cannot be read as an image", "remove or convert it")

    def test_cut_short(self, tmp_path: Path) -> None:
        paint(tmp_path / "a.png", shape=(64, 64, 3))
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
        fails(opened(tmp_path), "a.png: cannot be read as an image")

    @pytest.mark.parametrize("side", [30_000, 9_500])
    def test_a_bomb(self, tmp_path: Path, side: int) -> None:
        """A header that promises gigabytes over a few bytes of data: refused before it is decoded."""

        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
        fails(opened(tmp_path), "a.png: ", "pixels")

    def test_too_many_pixels(self, tmp_path: Path) -> None:
        paint(tmp_path / "a.png", shape=(9, 12, 3))
        limits = ReadLimits(max_image_pixels=100)
        fails(opened(tmp_path, limits=limits), "a.png: has 12x9 pixels, more than 100", "shrink it")

    def test_a_very_long_image(self, tmp_path: Path) -> None:
        pil.new("L", (10_000_000, 1)).save(tmp_path / "a.png")
        how = HowToRead(image=ImagePreprocess(fit="crop"))
        fails(opened(tmp_path, how=how), "a.png: data.preprocess.fit: crop would scale it to", "stretch")

    def test_a_huge_size(self, tmp_path: Path) -> None:
        paint(tmp_path / "a.png")
        how = HowToRead(image=ImagePreprocess(size=(16_000, 16_000)))
        with pytest.raises(CalibrationError, match=r"data.preprocess.size: .* more than the 2.0 GiB"):
            opened(tmp_path, InputInfo("x", X.dtype, (1, 3, None, None)), how)

    def test_deep_pixels(self, tmp_path: Path) -> None:
        pil.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "a.png")
        gray = InputInfo("x", X.dtype, (1, 1, 8, 8))
        fails(opened(tmp_path, gray), "a.png: has more than 8 bits a channel")

    def test_a_pipe(self, tmp_path: Path) -> None:
        import os

        os.mkfifo(tmp_path / "a.png")
        fails(opened(tmp_path), "a.png: not a regular file")

    def test_without_pillow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        paint(tmp_path / "a.png")
        monkeypatch.setitem(__import__("sys").modules, "PIL", None)
        with pytest.raises(CalibrationError, match=r"pip install 'onnxslim_ptq\[images\]'"):
            opened(tmp_path)
