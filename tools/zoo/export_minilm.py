"""Exports the MiniLM sentence encoder and its texts as token ids.

Usage: export_minilm.py OUT MODEL_FOLDER TEXTS.

TEXTS is a JSON file, {"calibration": [text, ...], "evaluation": [...], "latency": [text]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import BertModel

_LONGEST = 256  # tokens; what the model was trained for
_INPUTS = ["input_ids", "attention_mask", "token_type_ids"]


class Encoder(nn.Module):
    """The layers called one by one with a plain additive mask: no library plumbing in the graph."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Token embeddings of the last layer."""
        hidden = self.bert.embeddings(input_ids=ids, token_type_ids=types)
        added = (1.0 - mask[:, None, None, :].float()) * -1e9
        for layer in self.bert.encoder.layer:
            result = layer(hidden, added)
            hidden = result[0] if isinstance(result, tuple) else result
        return hidden


def main(out: str, folder: str, texts: str) -> None:
    """Write OUT/model.onnx (opset 17) and OUT/tokens.npz."""
    bert = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    model = Encoder(bert).eval()
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = torch.tensor([tokenizer.encode("hello world").ids])
    sample = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    axes = {name: {0: "batch", 1: "seq"} for name in [*_INPUTS, "last_hidden_state"]}
    with torch.no_grad():
        gap = float((model(*sample) - bert(*sample[:2]).last_hidden_state).abs().max())
        if gap > 1e-4:
            raise SystemExit(f"error: the exported form differs from the library's by {gap}")
        torch.onnx.export(
            model, sample, str(Path(out) / "model.onnx"), dynamo=False, opset_version=17,
            input_names=_INPUTS, output_names=["last_hidden_state"], dynamic_axes=axes,
        )  # fmt: skip
    arrays = {
        f"{role}{index}": np.array(tokenizer.encode(text).ids[:_LONGEST], np.int64)
        for role, group in json.loads(Path(texts).read_text()).items()
        for index, text in enumerate(group)
    }
    np.savez(Path(out) / "tokens.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
