"""A `PTQConfig` as steps of a recipe. Everything that quantizes is in those steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from onnxslim_ptq.core.cache import CachePair
from onnxslim_ptq.core.spec import Grain, PerTensor
from onnxslim_ptq.frontends.golden_stick.algorithms import AWQConfig, GPTQQuantConfig
from onnxslim_ptq.frontends.golden_stick.config import PTQConfig
from onnxslim_ptq.frontends.golden_stick.dtypes import (
    BackendTarget,
    OutliersSuppressionType,
    PrecisionRecovery,
    QuantGranularity,
    int4,
    int8,
)
from onnxslim_ptq.frontends.golden_stick.layers import Cell

__all__ = ["has_ascend_form", "recipe_of", "tag_of", "unread_arguments"]

Step = dict[str, Any]
_UNFUSED = ["unfused"]
# Golden Stick never clips these: their outputs meet in a product.
_NOT_CLIPPED = re.compile(r"(^|\.)(wq|wk|w_qkv|q_proj|k_proj|qkv_proj)$|routed_experts\.ffn\.w2$")
_SMOOTHED = {
    OutliersSuppressionType.SMOOTH: "SmoothQuant",
    OutliersSuppressionType.AWQ: "AWQ",
    OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE: "OSL",
    OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS: "OutlierSuppressionPlus",
}
_CLIPPED = (OutliersSuppressionType.AWQ, OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE)


def recipe_of(
    layers: Sequence[tuple[Cell, PTQConfig]],
    caches: Sequence[CachePair],
    config: PTQConfig,
    *,
    all_layers: int,
    deploy: bool = False,
) -> dict[str, Any]:
    """The recipe for these layers and caches; ``deploy``: the same graph by the cheapest steps.

    Raises ValueError for an argument that has no counterpart, naming it.
    """
    groups: list[tuple[PTQConfig, list[Cell]]] = []
    for cell, chosen in layers:
        known = next((cells for one, cells in groups if one is chosen), None)
        if known is None:
            groups.append((chosen, [cell]))
        else:
            known.append(cell)
    smoothing: list[Step] = []
    rounding: list[Step] = []
    for chosen, cells in groups:
        include = ["*"] if len(cells) == all_layers else _exactly(cell.node for cell in cells)
        step = _suppression(chosen, deploy)
        if step is not None:
            smoothing.append({**step, "include": include})
        rounding.append({**_quantize(chosen, deploy), "include": include})
        unclipped = [cell.node for cell in cells if _NOT_CLIPPED.search(cell.name)]
        if _clips(chosen) and unclipped and not deploy:
            rounding.append(
                {"type": "quantize", "include": _exactly(unclipped), "rounder": _unclipped(chosen)}
            )
    steps = smoothing + rounding
    if caches:
        per = "token" if config.kvcache_quant_granularity is QuantGranularity.PER_TOKEN else "channel"
        include = _exactly(pair.past for pair in caches)
        static = {"full_range": True} if per == "channel" else {}
        steps.append({"type": "kv_cache", "per": per, "include": include, **static})
    return {"target": _target(config, groups, bool(caches)), "steps": steps}


def has_ascend_form(config: PTQConfig) -> bool:
    """Whether AscendQuant graphs can hold it: static W8A8 with a float cache."""
    static = config.act_quant_granularity is QuantGranularity.PER_TENSOR
    w8a8 = config.weight_quant_dtype is int8 and config.act_quant_dtype is int8
    return w8a8 and static and config.kvcache_quant_dtype is None


def _target(config: PTQConfig, groups: Sequence[tuple[PTQConfig, list[Cell]]], caches: bool) -> str:
    fits = not caches and all(has_ascend_form(chosen) for chosen, _ in groups)
    return "ascend" if config.backend is BackendTarget.ASCEND and fits else "generic"


def _exactly(names: Iterable[str]) -> list[str]:
    return [f"re:{re.escape(name)}" for name in names]


def _quantize(config: PTQConfig, deploy: bool) -> Step:
    grouped = config.weight_quant_granularity is QuantGranularity.PER_GROUP
    weight: Step = {"dtype": str(config.weight_quant_dtype), "full_range": True}
    weight |= {"per": "group", "group_size": config.group_size} if grouped else {"per": "channel"}
    act: Step | None = None
    if config.act_quant_dtype is not None:
        static = config.act_quant_granularity is QuantGranularity.PER_TENSOR
        act = (
            {"symmetric": False, "range": {"type": "minmax"}}
            if static
            else {"per": "token", "when": "dynamic"}
        )
    rounder = {"type": "rtn"} if deploy else _rounder(config)
    return {"type": "quantize", "weight": weight, "act": act, "rounder": rounder, "bias_correction": False}


def _clips(config: PTQConfig) -> bool:
    return config.outliers_suppression in _CLIPPED


def _rounder(config: PTQConfig) -> Step:
    if config.precision_recovery is PrecisionRecovery.GPTQ:
        return {**_gptq(config), **({"clip": True} if _clips(config) else {})}
    return _clip(config) if _clips(config) else {"type": "rtn"}


def _unclipped(config: PTQConfig) -> Step:
    return _gptq(config) if config.precision_recovery is PrecisionRecovery.GPTQ else {"type": "rtn"}


def _gptq(config: PTQConfig) -> Step:
    given = _arguments(config, GPTQQuantConfig())
    if not given["block_size"]:
        raise ValueError("algo_args.block_size: 0 columns a block cannot be rounded; use 128")
    if config.weight_quant_dtype is int4 and config.act_quant_dtype is int8 and not given["desc_act"]:
        raise ValueError("algo_args.desc_act: int4 weights with int8 activations need desc_act=True")
    return {
        "type": "gptq",
        "block": given["block_size"],
        "damping": given["damp_percent"],
        "act_order": given["desc_act"],
        "static_groups": given["static_groups"],
    }


def _clip(config: PTQConfig) -> Step:
    ratios = _listed(_arguments(config, AWQConfig())["weight_clip_ratio"])
    if ratios == [1.0]:
        return {"type": "rtn"}
    steps = len(ratios)
    lowest = 1 - steps * (1 - ratios[1]) if steps > 1 else -1.0
    even = [1 - i * (1 - lowest) / steps for i in range(steps)]
    if steps < 2 or lowest < 0.05 or any(abs(a - b) > 1e-6 for a, b in zip(ratios, even, strict=True)):
        raise ValueError(
            f"algo_args.weight_clip_ratio: {ratios} has no counterpart; use even steps down from 1.0, or 1.0 alone"
        )
    return {"type": "clip", "lowest": round(lowest, 9), "steps": steps}


def _suppression(config: PTQConfig, deploy: bool) -> Step | None:
    kind = config.outliers_suppression
    if kind is OutliersSuppressionType.NONE:
        return None
    if kind is OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS:
        fixed = {"alpha": 0.5} if deploy else {}
        return {"type": "outlier_suppression_plus", "groups": _UNFUSED, **fixed}
    if deploy:
        return {"type": "smoothquant", "groups": _UNFUSED}
    if kind is OutliersSuppressionType.SMOOTH:
        return {"type": "smoothquant", "alpha": config.algo_args.get("alpha", 0.5), "groups": _UNFUSED}
    if kind is OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE:
        return {"type": "outlier_suppression_lite", "groups": _UNFUSED, "loss": "block"}
    given = _arguments(config, AWQConfig())
    alphas = _listed(given["smooth_alpha"])
    return {
        "type": "awq", "groups": _UNFUSED, "loss": "block", "duo": given["duo_scaling"], "exponents": alphas
    }  # fmt: skip


def unread_arguments(config: PTQConfig) -> list[str]:
    """The keys of ``algo_args`` that nothing in ``config`` reads."""
    kind = config.outliers_suppression
    known: set[str] = set()
    if kind is OutliersSuppressionType.SMOOTH:
        known |= {"alpha"}
    if kind is OutliersSuppressionType.AWQ:
        known |= vars(AWQConfig()).keys()
    if kind is OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE:
        known |= {"weight_clip_ratio"}
    if config.precision_recovery is PrecisionRecovery.GPTQ:
        known |= vars(GPTQQuantConfig()).keys()
    return [str(key) for key in config.algo_args if key not in known]


def _arguments(config: PTQConfig, default: GPTQQuantConfig | AWQConfig) -> dict[str, Any]:
    """The fields of ``default`` with what ``algo_args`` says about them, checked like its own."""
    names = list(vars(default))
    given = {name: value for name, value in config.algo_args.items() if name in names}
    return vars(type(default)(**given))


def _listed(values: Any) -> list[float]:
    found = [float(v) for v in (values if isinstance(values, list) else [values])]
    if not found:
        raise ValueError("algo_args: an empty list leaves nothing to search; give at least one value")
    return found


def tag_of(config: PTQConfig, cell: Cell, grain: Grain) -> str:
    """What is done to a layer, in order, as Golden Stick's summary names it: ``AWQ-wclip-W4-per_group``.

    ``grain``: that of the weight in the plan; a target may take one scale for a whole weight only.
    """
    parts = [_SMOOTHED[config.outliers_suppression]] if config.outliers_suppression in _SMOOTHED else []
    if _clips(config) and not _NOT_CLIPPED.search(cell.name):
        parts.append("wclip")
    if config.precision_recovery is PrecisionRecovery.GPTQ:
        parts.append("GPTQ")
    assert config.weight_quant_dtype is not None, "only layers with quantized weights have a tag"
    shared = QuantGranularity.PER_TENSOR if isinstance(grain, PerTensor) else config.weight_quant_granularity
    parts.append(f"W{config.weight_quant_dtype.bits}-{shared}")
    if config.act_quant_dtype is not None:
        parts.append(f"A{config.act_quant_dtype.bits}-{config.act_quant_granularity}")
    return "-".join(parts)
