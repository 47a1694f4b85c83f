"""basic-pitch, a note transcriber whose Convs share weights, on synthesized music with known notes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np

from .cache import package
from .case import Case, Feed, Lazy, Outputs

_RATE, _LENGTH = 22050, 43844  # what the network takes: just under two seconds
_FRAMES, _KEYS, _LOWEST = 172, 88, 21
_CALIBRATION, _EVALUATION = 64, 64
_THRESHOLD = 0.3
_NOTES = 1  # which output holds the notes: StatefulPartitionedCall:1


def load() -> Case:
    """The case, judged by the F1 of (frame, key) cells, at the package's own threshold."""
    model = package("basic-pitch==0.4.0") / "basic_pitch" / "saved_models" / "icassp_2022" / "nmp.onnx"
    calibration = Lazy(range(_CALIBRATION), _feed)
    evaluation = Lazy(range(_CALIBRATION, _CALIBRATION + _EVALUATION), _feed)
    return Case("basic-pitch", model, calibration, evaluation, _score, evaluation[0])


def _feed(seed: int) -> Feed:
    return {"serving_default_input_2:0": _music(seed)[0]}


@cache
def _music(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A window of two or three voices of plucked or bowed notes, and which key sounds in which frame."""
    random, time = np.random.RandomState(seed), np.arange(_LENGTH) / _RATE
    sound, keys = np.zeros(_LENGTH), np.zeros((_FRAMES, _KEYS), bool)
    for _ in range(random.randint(1, 4)):
        start, decay = -random.uniform(0, 0.3), random.choice([0.0, 1.5, 3.0])
        while start < time[-1]:
            length, pitch = random.uniform(0.2, 0.8), random.randint(40, 84)
            sound += random.uniform(0.3, 1) * _note(random, time - start, length, pitch, decay)
            first, last = (
                int(np.clip(moment * _FRAMES / time[-1], 0, _FRAMES)) for moment in (start, start + length)
            )
            keys[first:last, pitch - _LOWEST] = True
            start += length + random.choice([0.0, 0.1])
    sound = sound / np.abs(sound).max() * random.uniform(0.3, 0.9) + random.normal(0, 0.003, _LENGTH)
    return sound.astype(np.float32).reshape(1, -1, 1), keys


def _note(
    random: np.random.RandomState, time: np.ndarray, length: float, pitch: int, decay: float
) -> np.ndarray:
    frequency = 440 * 2 ** ((pitch - 69 + random.normal(0, 0.05)) / 12)
    slope, phase = random.uniform(1, 2), random.uniform(0, 2 * np.pi, 9)
    tone = sum(np.sin(2 * np.pi * k * frequency * time + phase[k]) / k**slope for k in range(1, 9))
    envelope = np.clip(time / 0.01, 0, 1) * np.clip((length - time) / 0.03, 0, 1)
    return tone * envelope * np.exp(-decay * np.clip(time, 0, None))


def _score(outputs: Iterable[Outputs]) -> dict[str, float]:
    right = found = wanted = 0
    for index, output in enumerate(outputs):
        keys, heard = _music(_CALIBRATION + index)[1], output[_NOTES][0] > _THRESHOLD
        right, found, wanted = (
            right + int((keys & heard).sum()),
            found + int(heard.sum()),
            wanted + int(keys.sum()),
        )
    return {"note_f1": 2 * right / max(found + wanted, 1)}
