"""Exports SmolLM2-135M with its KV cache, and texts as token ids.

Usage: export_smollm2.py OUT MODEL_FOLDER TEXTS.

The weights come from a GGUF file in Q4_1: dequantized, they sit on a 4-bit grid, which 4-bit methods can
find again. TEXTS is a JSON file, {role: text, ...}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Norm(nn.Module):
    """RMS normalization, spelled out."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(norm.weight.clone()), norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x over its root mean square, times the weight."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


def turned(x: torch.Tensor) -> torch.Tensor:
    """The half-rotated vector of rotary embeddings."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class Block(nn.Module):
    """One decoder layer that appends to the keys and values of the past."""

    def __init__(self, layer: nn.Module, heads: int, groups: int) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.input_norm, self.mlp_norm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.heads, self.groups = heads, groups

    def _split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def _repeat(self, x: torch.Tensor) -> torch.Tensor:
        batch, groups, length, width = x.shape
        spread = x[:, :, None].expand(batch, groups, self.heads // groups, length, width)
        return spread.reshape(batch, self.heads, length, width)

    def forward(self, x, key_past, value_past, cos, sin, mask):  # type: ignore[no-untyped-def]
        """The new hidden state with the keys and values of past and present."""
        h = self.input_norm(x)
        query = self._split(self.q_proj(h), self.heads)
        key, value = self._split(self.k_proj(h), self.groups), self._split(self.v_proj(h), self.groups)
        query, key = query * cos + turned(query) * sin, key * cos + turned(key) * sin
        key, value = torch.cat((key_past, key), 2), torch.cat((value_past, value), 2)
        weights = query @ self._repeat(key).transpose(-1, -2) * query.shape[-1] ** -0.5 + mask
        mixed = torch.softmax(weights, -1) @ self._repeat(value)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
        h = self.mlp_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h)), key, value


class Decoder(nn.Module):
    """The whole model: ids, mask, positions and 2 tensors a layer of the past in; logits and those out."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        config = source.config
        self.embedding, self.head, self.norm = (
            source.model.embed_tokens,
            source.lm_head,
            Norm(source.model.norm),
        )
        heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.layers = nn.ModuleList([Block(layer, heads, self.groups) for layer in source.model.layers])
        self.width = config.hidden_size // heads
        self.register_buffer("inverse", source.model.rotary_emb.inv_freq.clone().float())

    def forward(self, ids, attention_mask, positions, *past):  # type: ignore[no-untyped-def]
        """Logits of every position, then the keys and values of each layer."""
        x, new, total = self.embedding(ids), ids.shape[1], attention_mask.shape[1]
        angles = positions[:, :, None].float() * self.inverse
        angles = torch.cat((angles, angles), -1)[:, None]
        columns = torch.arange(total)[None, None, None, :]
        rows = (torch.arange(new) + (total - new))[None, None, :, None]
        visible = (columns <= rows) & (attention_mask[:, None, None, :] > 0)
        mask, present = torch.where(visible, 0.0, -1e9), []
        for index, layer in enumerate(self.layers):
            x, key, value = layer(x, past[2 * index], past[2 * index + 1], angles.cos(), angles.sin(), mask)
            present += [key, value]
        return (self.head(self.norm(x)), *present)


def export(model: Decoder, ids: torch.Tensor, path: Path) -> None:
    """Write the ONNX file, with batch, new and past lengths free."""
    kinds = [f"{index}.{kind}" for index in range(len(model.layers)) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{kind}" for kind in kinds)]
    outputs = ["logits", *(f"present.{kind}" for kind in kinds)]
    axes = {name: {0: "batch", 1: "seq"} for name in ("input_ids", "position_ids", "logits")}
    axes["attention_mask"] = {0: "batch", 1: "total"}
    axes |= {name: {0: "batch", 2: "past"} for name in inputs[3:]}
    axes |= {name: {0: "batch", 2: "total"} for name in outputs[1:]}
    past = [torch.randn(1, model.groups, 3, model.width) for _ in kinds]
    mask = torch.ones(1, ids.shape[1] + 3, dtype=torch.long)
    sample = (ids, mask, torch.arange(3, 3 + ids.shape[1])[None], *past)
    torch.onnx.export(
        model, sample, str(path), dynamo=False, opset_version=17,
        input_names=inputs, output_names=outputs, dynamic_axes=axes,
    )  # fmt: skip


def main(out: str, folder: str, texts: str) -> None:
    """Write OUT/model.onnx (opset 17) and OUT/tokens.npz."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    source = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_GGUF, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = Decoder(source).eval()
    ids = tokenizer("The quick brown fox jumps over the lazy dog and", return_tensors="pt").input_ids
    with torch.no_grad():
        none = [torch.zeros(1, model.groups, 0, model.width) for _ in range(2 * len(model.layers))]
        logits = model(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None], *none)[0]
        gap = float((logits - source(ids).logits).abs().max())
        if gap > 1e-2:
            raise SystemExit(f"error: the exported form differs from the library's by {gap}")
        export(model, ids, Path(out) / "model.onnx")
    tokens = {
        role: np.array(tokenizer(text).input_ids, np.int64)
        for role, text in json.loads(Path(texts).read_text()).items()
    }
    np.savez(Path(out) / "tokens.npz", **tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
