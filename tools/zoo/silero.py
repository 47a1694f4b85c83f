"""The six files of the silero-vad package: LSTM, If subgraphs, weights inside subgraphs.

They are recurrent, and a case's feeds are fixed, so the float model runs over the track once and its
states are kept as inputs: the score tells the damage within one step, not what adds up over time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from .cache import build, package
from .case import Case, Feed, Lazy, Outputs
from .session import open_session
from .speech import RATE, frames, track

_CONTEXT = 64
_CALIBRATION = 64
_SEQUENCE = 8  # frames a sample, for the file that takes many at once
FILES = {
    "silero": "silero_vad",
    "silero-16k-op15": "silero_vad_16k_op15",
    "silero-half": "silero_vad_half",
    "silero-op18-ifless": "silero_vad_op18_ifless",
    "silero-openvino-16k": "silero_vad_openvino_16k",
    "silero-16k-sequence": "silero_vad_16k_sequence",
}


def load(name: str) -> Case:
    """The case of one file, judged by the share of 32 ms frames that it sorts into speech or not."""
    model = package("silero-vad==6.2.3") / "silero_vad" / "data" / f"{FILES[name]}.onnx"
    data = build(f"rendered/{name}-r2.npz", partial(_make_data, model))
    with np.load(data) as archive:
        arrays = {key: archive[key] for key in archive.files}
    inputs = [key.removeprefix("evaluation.") for key in arrays if key.startswith("evaluation.")]
    chosen = np.linspace(0, len(arrays["calibration.input"]) - 1, _CALIBRATION).astype(int).tolist()
    calibration = Lazy(chosen, partial(_feed, arrays, "calibration", inputs))
    evaluation = Lazy(range(len(arrays["evaluation.input"])), partial(_feed, arrays, "evaluation", inputs))
    score = partial(_score, arrays["labels"])
    return Case(name, model, calibration, evaluation, score, evaluation[len(evaluation) // 2])


def _feed(arrays: dict[str, np.ndarray], role: str, inputs: list[str], index: int) -> Feed:
    # asarray: an index into a vector of scalars gives a numpy scalar, which onnxruntime does not take
    return {name: np.asarray(arrays[f"{role}.{name}"][index]) for name in inputs}


def _make_data(model: Path, path: Path) -> None:
    """Every step's inputs, with the states that the float model passed on."""
    session = open_session(model)
    inputs = {entry.name: entry.shape for entry in session.get_inputs()}
    length = _SEQUENCE if "h" in inputs else 1
    kept: dict[str, list[np.ndarray]] = {}
    for role in ("calibration", "evaluation"):
        rows = frames(track(role)[0], _CONTEXT)
        state = {
            name: np.zeros((2 if name == "state" else 1, 1, 128), np.float32)
            for name in inputs.keys() & _STATES
        }
        for start in range(0, len(rows) - length + 1, length):
            feed = {"input": rows[start : start + length], **state}
            if "sr" in inputs:
                feed["sr"] = np.array(RATE, np.int64)
            for name, value in feed.items():
                kept.setdefault(f"{role}.{name}", []).append(value)
            state = dict(zip(sorted(state, key=_STATES.index), session.run(None, feed)[1:], strict=True))
    labels = track("evaluation")[1][: len(kept["evaluation.input"]) * length]
    np.savez(path, labels=labels, **{name: np.stack(values) for name, values in kept.items()})


_STATES = ("state", "h", "c")  # in the order of the outputs that renew them


def _score(labels: np.ndarray, outputs: Iterable[Outputs]) -> dict[str, float]:
    speech = np.concatenate([probability.reshape(-1) > 0.5 for probability, *_ in outputs])
    return {"frame_accuracy": float((speech == labels).mean())}
