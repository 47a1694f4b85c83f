"""Renders text lines, orientation crops and pages with known content: labelled data without a download.

Text is drawn in random fonts and colours, then turned slightly, blurred, shrunk and made noisy, which
leaves a good recognizer a few percent of errors; a set that is always right would show no damage.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from .cache import build, need
from .fonts import font_files
from .text import words

REVISION = 1  # part of the file names: raise it when the rendering changes
PAGE = (480, 640)


class Renderer:
    """Draws from one seeded stream, so the same data set comes out on every run."""

    def __init__(self, stream: str) -> None:
        need("PIL", "Pillow")
        need("cv2", "opencv-python-headless")
        self.random = random.Random(f"onnxslim_ptq-{stream}-0")
        self.noise = np.random.RandomState(0)
        self.words = words()
        self.fonts = font_files()
        self._fonts: dict[tuple[Path, int], Any] = {}

    def phrase(self, longest: int) -> str:
        """One to four words, one time in five a number and a word, one time in five in capitals."""
        pick = self.random
        if pick.random() < 0.2:
            digits = "".join(pick.choice("0123456789") for _ in range(pick.randint(3, 8)))
            text = digits + pick.choice(["", " ", "-", "/", "."]) + pick.choice(self.words)
        else:
            text = " ".join(pick.choice(self.words) for _ in range(pick.randint(1, 4)))
        if pick.random() < 0.2:
            text = text.upper()
        return text[:longest].strip()

    def _font(self, size: int) -> Any:
        from PIL import ImageFont

        key = (self.random.choice(self.fonts), size)
        if key not in self._fonts:
            self._fonts[key] = ImageFont.truetype(str(key[0]), size)
        return self._fonts[key]

    def line(self, text: str, size: int, hard: bool) -> np.ndarray:
        """The text as a BGR image; `hard` adds a slight turn, lost resolution, blur and noise."""
        from PIL import Image, ImageDraw

        pick, font = self.random, self._font(size)
        left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
        pad = pick.randint(2, 8)
        paper = tuple(pick.randint(150, 255) for _ in range(3))
        ink = tuple(pick.randint(0, 90) for _ in range(3))
        if pick.random() < 0.25:
            paper, ink = ink, paper
        image = Image.new("RGB", (right - left + 2 * pad, bottom - top + 2 * pad), paper)
        ImageDraw.Draw(image).text((pad - left, pad - top), text, font=font, fill=ink)
        if hard and pick.random() < 0.5:
            turn = pick.uniform(-2.5, 2.5)
            image = image.rotate(turn, resample=Image.Resampling.BILINEAR, expand=True, fillcolor=paper)
        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
        return self._damage(pixels) if hard else pixels

    def _damage(self, pixels: np.ndarray) -> np.ndarray:
        import cv2

        pick = self.random
        if pick.random() < 0.4:
            factor = pick.choice([2, 3])
            height, width = pixels.shape[:2]
            small = (max(8, width // factor), max(8, height // factor))
            pixels = cv2.resize(cv2.resize(pixels, small, interpolation=cv2.INTER_AREA), (width, height))
        if pick.random() < 0.5:
            pixels = cv2.GaussianBlur(pixels, (3, 3), pick.uniform(0.5, 1.5))
        return self.grain(pixels, 22)

    def grain(self, pixels: np.ndarray, strongest: float) -> np.ndarray:
        """Gaussian noise of a random strength."""
        noise = self.noise.normal(0, self.random.uniform(0, strongest), pixels.shape)
        return np.clip(pixels + noise, 0, 255).astype(np.uint8)

    def page(self) -> tuple[np.ndarray, np.ndarray]:
        """A page with a shaded background and its text boxes as rows of left, top, right, bottom."""
        import cv2

        pick, (height, width) = self.random, PAGE
        shade = np.linspace(pick.uniform(0.6, 1), pick.uniform(0.6, 1), width)[None, :, None]
        colour = np.array([pick.randint(90, 255) for _ in range(3)])
        page = np.clip(colour * shade * np.ones((height, width, 1)), 0, 255).astype(np.uint8)
        boxes: list[tuple[int, int, int, int]] = []
        top = pick.randint(8, 30)
        while top < height - 50:
            self._row(page, top, boxes)
            top += pick.randint(45, 90)
        page = self.grain(page, 18)
        if pick.random() < 0.5:
            page = cv2.GaussianBlur(page, (3, 3), pick.uniform(0.4, 1.2))
        return page, np.array(boxes, dtype=np.int32).reshape(-1, 4)

    def _row(self, page: np.ndarray, top: int, boxes: list[tuple[int, int, int, int]]) -> None:
        pick, (height, width) = self.random, PAGE
        left = pick.randint(5, 120)
        while left < width - 80:
            crop = self.line(self.phrase(18), size=pick.randint(14, 34), hard=False)
            tall, wide = crop.shape[:2]
            if left + wide > width - 5 or top + tall > height - 5:
                return
            page[top : top + tall, left : left + wide] = crop
            boxes.append((left, top, left + wide, top + tall))
            left += wide + pick.randint(20, 150)


def fit(pixels: np.ndarray, height: int, widest: int | None = None) -> np.ndarray:
    """Scaled to the height, its width following (but at most `widest`), as the OCR package does."""
    import cv2

    tall, wide = pixels.shape[:2]
    width = max(16, int(np.ceil(height * wide / tall)))
    return cv2.resize(pixels, (min(width, widest) if widest else width, height))


def lines(count: int) -> Path:
    """`count` text lines of height 48 with their strings, no string twice."""

    def make(path: Path) -> None:
        renderer = Renderer("rec")
        texts: list[str] = []
        images: dict[str, Any] = {}
        while len(texts) < count:
            text = renderer.phrase(26)
            if text in texts:
                continue
            images[f"image{len(texts)}"] = fit(renderer.line(text, renderer.random.randint(22, 44), True), 48)
            texts.append(text)
        np.savez(path, labels=np.array(texts), **images)

    return build(f"rendered/lines-{count}-r{REVISION}.npz", make)


def crops(count: int) -> Path:
    """`count` lines at most 192 wide, half of them upside down (label 1)."""

    def make(path: Path) -> None:
        renderer = Renderer("cls")
        labels: list[int] = []
        images: dict[str, Any] = {}
        while len(labels) < count:
            text = renderer.phrase(14)
            if len(text) < 4:
                continue
            pixels = renderer.line(text, renderer.random.randint(22, 44), True)
            flipped = renderer.random.random() < 0.5
            pixels = np.ascontiguousarray(pixels[::-1, ::-1]) if flipped else pixels
            images[f"image{len(labels)}"] = fit(pixels, 48, 192)
            labels.append(int(flipped))
        np.savez(path, labels=np.array(labels), **images)

    return build(f"rendered/crops-{count}-r{REVISION}.npz", make)


def pages(count: int) -> Path:
    """`count` pages with the boxes of their text."""

    def make(path: Path) -> None:
        renderer = Renderer("det")
        content: dict[str, Any] = {}
        for index in range(count):
            content[f"image{index}"], content[f"boxes{index}"] = renderer.page()
        np.savez(path, **content)

    return build(f"rendered/pages-{count}-r{REVISION}.npz", make)
