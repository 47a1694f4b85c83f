"""What is measured: the settings of the other tool, the ready recipes, and the models."""

from __future__ import annotations

from dataclasses import dataclass

MODELS = ("rec", "cls", "det", "effnet", "minilm", "smollm2")
RANGE_MODELS = ("rec", "cls", "det", "effnet", "minilm")
RECIPES = (
    "w8a8",
    "w8a8-minmax",
    "w8a8-percentile",
    "w8a8-entropy",
    "w8a8-mse",
    "w8a8-histogram",
    "w8a8-mixed",
    "w8a8-output-mse",
)
# The default comes first: latencies are compared with it. Weight-only and per-token forms are for transformers.
QUALITY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rec", "cls", "det", "effnet"), ("w8a8", "w8a8-best")),
    "minilm": ("w8a8", "w8a8-transformer", "w8a8-best", "w8a8-dynamic", "w8a16", "w4a16-g64"),
    "smollm2": ("w8a8", "w8a8-transformer", "w8a8-decoder", "w8a16", "w4a16-g64", "w4a16-g64-symmetric"),
}
OUTLIER_MODELS = ("llama-block", "minilm")
LINEAR_OPS = ("Conv", "MatMul", "Gemm")
HEAVY = ("smollm2",)  # 652 MB: one setting of the other tool is enough to wait for


@dataclass(frozen=True)
class Setting:
    """One way to call `quantize_static`; without `prepared` the file as shipped and every default."""

    name: str
    method: str = "MinMax"
    ops: tuple[str, ...] | None = None
    prepared: bool = True


PEERS = (
    Setting("defaults, file as shipped", prepared=False),
    Setting("Conv/MatMul/Gemm, MinMax", "MinMax", LINEAR_OPS),
    Setting("Conv/MatMul/Gemm, Percentile 99.99", "Percentile", LINEAR_OPS),
    Setting("Conv/MatMul/Gemm, Entropy", "Entropy", LINEAR_OPS),
    Setting("all operators, MinMax", "MinMax"),
    Setting("all operators, Percentile 99.99", "Percentile"),
    Setting("all operators, Entropy", "Entropy"),
)


def peers_of(model: str) -> tuple[Setting, ...]:
    """The settings worth their time on this model."""
    return PEERS[1:2] if model in HEAVY else PEERS
