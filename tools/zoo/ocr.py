"""The three networks of the rapidocr package on rendered data: recognition, orientation, detection.

Preprocessing is the package's own: BGR pixels, (x / 255 - 0.5) / 0.5, zero padding on the right.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from . import render
from .boxes import find_boxes, match
from .cache import need, package
from .case import Case, Feed, Lazy, Outputs, Score

_RAPIDOCR = "rapidocr-onnxruntime==1.4.4"
_CALIBRATION = 64
_LINES, _CROPS, _PAGES = 300, 400, 200


def _model(name: str) -> Path:
    return package(_RAPIDOCR) / "rapidocr_onnxruntime" / "models" / name


@lru_cache(maxsize=8)
def _open(path: Path, process: int) -> np.lib.npyio.NpzFile:
    return np.load(path)


def _array(path: Path, key: str) -> np.ndarray:
    """One array of the archive; every process has its own file handle, because forks share the offset."""
    return _open(path, os.getpid())[key]


def _normalized(pixels: np.ndarray) -> np.ndarray:
    return (pixels.transpose(2, 0, 1).astype(np.float32) / 255 - 0.5) / 0.5


def _feed(path: Path, width_of: tuple[int, int], index: int) -> Feed:
    """The image padded with zeros to a multiple of `width_of[1]`, at least `width_of[0]` wide."""
    image = _normalized(_array(path, f"image{index}"))
    least, step = width_of
    width = max(least, -(-image.shape[2] // step) * step)
    padded = np.zeros((1, 3, image.shape[1], width), np.float32)
    padded[0, :, :, : image.shape[2]] = image
    return {"x": padded}


def _case(name: str, model: Path, data: Path, width_of: tuple[int, int], count: int, score: Score) -> Case:
    make = partial(_feed, data, width_of)
    calibration = Lazy(range(_CALIBRATION), make)
    evaluation = Lazy(range(_CALIBRATION, _CALIBRATION + count), make)
    return Case(name, model, calibration, evaluation, score, evaluation[0])


def load_rec() -> Case:
    """Text recognition: CNN with attention, dynamic width, weights in Constant nodes."""
    model, data = _model("ch_PP-OCRv4_rec_infer.onnx"), render.lines(_CALIBRATION + _LINES)
    texts = [str(text) for text in _array(data, "labels")[_CALIBRATION:]]
    return _case("rec", model, data, (320, 32), _LINES, partial(_score_lines, model, texts))


def characters(model: Path) -> list[str]:
    """The recognizer's alphabet as its metadata holds it, with the CTC blank first and the space last."""
    import onnx

    held = {entry.key: entry.value for entry in onnx.load(str(model)).metadata_props}
    return ["", *held["character"].splitlines(), " "]


def _score_lines(model: Path, texts: list[str], outputs: Iterable[Outputs]) -> dict[str, float]:
    """Greedy CTC decoding: repeats merge, blanks vanish.

    Spaces do not count: the float model drops or invents them at will, which would hide real damage.
    """
    alphabet, right, edits = characters(model), 0, 0
    wanted = [text.replace(" ", "") for text in texts]
    for text, (probabilities, *_) in zip(wanted, outputs, strict=True):
        steps = probabilities[0].argmax(-1)
        kept = steps[np.concatenate(([True], steps[1:] != steps[:-1]))]
        read = "".join(alphabet[step] for step in kept).replace(" ", "")
        right += read == text
        edits += edit_distance(read, text)
    return {"line_accuracy": right / len(wanted), "cer": edits / sum(map(len, wanted))}


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def load_cls() -> Case:
    """Orientation (upright or upside down): a small depthwise CNN with HardSwish."""
    data = render.crops(_CALIBRATION + _CROPS)
    labels = [int(label) for label in _array(data, "labels")[_CALIBRATION:]]
    model = _model("ch_ppocr_mobile_v2.0_cls_infer.onnx")
    return _case("cls", model, data, (192, 192), _CROPS, partial(_score_labels, labels))


def _score_labels(labels: list[int], outputs: Iterable[Outputs]) -> dict[str, float]:
    right = [int(values[0].argmax()) == label for label, (values, *_) in zip(labels, outputs, strict=True)]
    return {"accuracy": float(np.mean(right))}


def load_det() -> Case:
    """Text detection: a map of text probability over the page, judged by the boxes found in it.

    Pages enter at their own 480x640 (the package would enlarge them to 736x992, for no gain on these).
    """
    need("cv2", "opencv-python-headless")
    data = render.pages(_CALIBRATION + _PAGES)
    score = partial(_score_pages, data)
    return _case("det", _model("ch_PP-OCRv4_det_infer.onnx"), data, (640, 32), _PAGES, score)


def _score_pages(data: Path, outputs: Iterable[Outputs]) -> dict[str, float]:
    """Precision, recall and their harmonic mean over all pages together (a match has IoU >= 0.5)."""
    right = found = wanted = 0
    for index, (probability, *_) in enumerate(outputs):
        truth = _array(data, f"boxes{_CALIBRATION + index}")
        boxes = find_boxes(probability[0, 0])
        right, found, wanted = right + match(boxes, truth), found + len(boxes), wanted + len(truth)
    precision, recall = right / max(found, 1), right / max(wanted, 1)
    return {"hmean": 2 * right / max(found + wanted, 1), "precision": precision, "recall": recall}
