"""`PTQ`: Golden Stick's workflow on ONNX graphs, QUANTIZE -> save -> DEPLOY -> load."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from calib.model import Model, open_model
from calib.types import Feed
from onnxslim_ptq.api import quantize
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.frontends.golden_stick.checkpoint import load_checkpoint
from onnxslim_ptq.frontends.golden_stick.config import PTQConfig
from onnxslim_ptq.frontends.golden_stick.deploy import skeleton
from onnxslim_ptq.frontends.golden_stick.dtypes import (
    BackendTarget,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQMode,
    int4,
    int8,
)
from onnxslim_ptq.frontends.golden_stick.layers import Cell, Policies, assign, caches_of, cells_of
from onnxslim_ptq.frontends.golden_stick.network import Network
from onnxslim_ptq.frontends.golden_stick.translate import recipe_of, tag_of, unread_arguments
from onnxslim_ptq.recipe import Recipe

__all__ = ["PTQ", "Given", "Helper", "opened"]

_DOUBTFUL = 6.0
Given = str | Path | onnx.ModelProto
Helper = Callable[[Any], Feed]


class PTQ:
    """Quantizes networks as ``config`` says, layers whose name a key of ``layer_policies`` matches as that one says.

    Raises TypeError and ValueError as Golden Stick does for what does not go together.
    """

    def __init__(
        self,
        config: PTQConfig | None = None,
        layer_policies: OrderedDict[str, PTQConfig | None] | None = None,
    ) -> None:
        config = PTQConfig() if config is None else config
        if not isinstance(config, PTQConfig):
            raise TypeError(f"PTQ: config must be a PTQConfig, got {type(config).__name__}")
        _check(config)
        self._config = config
        self._policies = _policies(config, layer_policies)

    def apply(
        self,
        model: Given,
        helper: Helper | None = None,
        datasets: Iterable[Any] | None = None,
    ) -> Network:
        """Decide how the network is quantized: from ``datasets`` in QUANTIZE mode, without any in DEPLOY mode.

        ``datasets``: re-iterable feeds, or items that ``helper`` turns into feeds. RuntimeError when two policies match
        one layer, ValueError without datasets; with nothing to quantize the network stays as it is, with a warning.
        """
        source = opened(model)
        if helper is not None and not callable(helper):
            raise TypeError(f"PTQ.apply: helper must turn an item of datasets into a feed, got {helper!r}")
        deploy = self._config.mode is PTQMode.DEPLOY
        if not deploy and datasets is None:
            raise ValueError(
                "PTQ.apply: QUANTIZE needs datasets; mode=PTQMode.DEPLOY builds the graph without"
            )
        if datasets is not None and (isinstance(datasets, str) or not isinstance(datasets, Iterable)):
            raise TypeError(
                f"PTQ.apply: datasets must be an iterable of feeds, got {type(datasets).__name__}"
            )
        return self._apply(model, source, None if deploy else _Feeds(datasets or (), helper), deploy)

    def _apply(self, model: Given, source: Model, feeds: _Feeds | None, deploy: bool) -> Network:
        """Without ``feeds`` nothing is run; unless ``deploy``, weights are rounded all the same."""
        cells = cells_of(source)
        layers = [(c, one) for c, one in assign(cells, self._config, self._policies) if _quantizes(one)]
        asked = self._config.kvcache_quant_dtype is int8
        caches = caches_of(source) if asked else []
        if asked and not caches:
            warnings.warn("this network has no KV cache: kvcache_quant_dtype has no effect", stacklevel=3)
        blacklist = self._config.opname_blacklist
        caches = [pair for pair in caches if not Cell(pair.present, pair.past).hit(blacklist)]
        if not layers and not caches:
            warnings.warn("nothing in this network is quantized; it stays as it is", stacklevel=3)
            return Network(source, pending=source)
        make = partial(recipe_of, layers, caches, self._config, all_layers=len(cells))
        described = make(deploy=deploy)
        if self._config.backend is BackendTarget.ASCEND and described["target"] != "ascend":
            warnings.warn(
                "AscendQuant graphs hold static W8A8 with a float cache only; this one is written as plain ONNX",
                stacklevel=3,
            )
        recipe = Recipe.load(described)
        if feeds is None:
            pending, plan = skeleton(source, recipe, empty=deploy)
            tags = self._tags(layers, plan)
            return Network(
                source, tags, pending, placeholders=deploy, quant_type=Recipe.load(make()).quant_type
            )
        result = quantize(model, recipe, feeds, min_sqnr=0.0)
        sqnr = result.metrics["sqnr_db"]
        if sqnr is not None and sqnr < _DOUBTFUL:
            warnings.warn(
                f"the worst output is at {sqnr:.1f} dB SQNR against the float network", stacklevel=3
            )
        tags = self._tags(layers, result.plan)
        return Network(source, tags, result.quantized, result=result, quant_type=recipe.quant_type)

    def _tags(self, layers: Iterable[tuple[Cell, PTQConfig]], plan: QuantPlan) -> dict[str, str]:
        grains = {use.node: slot.spec.grain for use, slot in plan.weights.items()}
        tags = {c.name: tag_of(one, c, grains[c.node]) for c, one in layers if c.node in grains}
        caches = {c.pair.past: f"C8-{self._config.kvcache_quant_granularity}" for c in plan.io}
        return {**tags, **caches}

    def convert(self, network: Network, ckpt_path: str = "") -> Network:
        """The network with its quantized graph; with ``ckpt_path`` its parameters are loaded from there.

        TypeError for anything but a `Network` and a str, ValueError for a path that is no file or does not fit.
        """
        if not isinstance(network, Network):
            raise TypeError(f"PTQ.convert: expected what PTQ.apply returned, got {type(network).__name__}")
        if not isinstance(ckpt_path, str):
            raise TypeError(f"PTQ.convert: ckpt_path must be a str, got {type(ckpt_path).__name__}")
        if ckpt_path and not Path(ckpt_path).is_file():
            raise ValueError(f"PTQ.convert: ckpt_path '{ckpt_path}' is no file")
        converted = replace(network, quantized=network.pending)
        if ckpt_path:
            load_checkpoint(ckpt_path, converted)
        return converted

    def summary(self, network: Network | str | Path | onnx.ModelProto) -> dict[str, str]:
        """What is done to each layer and cache, by name; empty before apply. TypeError for anything but a network."""
        if isinstance(network, Network):
            return dict(network.tags)
        if not isinstance(network, str | Path | onnx.ModelProto):
            raise TypeError(f"PTQ.summary: expected a network, got {type(network).__name__}")
        return {}


class _Feeds:
    """``datasets`` as feeds, made one at a time."""

    def __init__(self, items: Iterable[Any], helper: Helper | None) -> None:
        self._items = list(items) if isinstance(items, Iterator) else items
        self._helper = helper

    def __iter__(self) -> Iterator[Feed]:
        for item in self._items:
            yield item if self._helper is None else self._helper(item)


def opened(model: object) -> Model:
    if not isinstance(model, str | Path | onnx.ModelProto):
        raise TypeError(
            f"PTQ.apply: expected the path of an ONNX model or a ModelProto, got {type(model).__name__}"
        )
    return open_model(model)


def _quantizes(config: PTQConfig) -> bool:
    return config.weight_quant_dtype is not None


def _check(config: PTQConfig) -> None:
    """ValueError for what is legal in a PTQConfig and yet cannot be done, a warning for what does nothing."""
    weight, act = config.weight_quant_dtype, config.act_quant_dtype
    if act is int8 and weight is None:
        raise ValueError("PTQ: act_quant_dtype=int8 needs weight_quant_dtype=int8 or int4")
    w8a8 = weight is int8 and act is int8
    awq = config.outliers_suppression is OutliersSuppressionType.AWQ
    if w8a8 and (awq or config.precision_recovery is PrecisionRecovery.GPTQ):
        raise ValueError("PTQ: W8A8 goes neither with AWQ nor with GPTQ")
    lite = config.outliers_suppression is OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE
    if lite and not (w8a8 and config.kvcache_quant_dtype is None):
        raise ValueError("PTQ: OUTLIER_SUPPRESSION_LITE goes with W8A8 and a float KV cache only")
    if weight is int4 and config.kvcache_quant_dtype is int8:
        raise ValueError("PTQ: int4 weights do not go with an int8 KV cache")
    if unread := unread_arguments(config):
        warnings.warn(f"algo_args: nothing reads {', '.join(unread)}", stacklevel=4)


def _policies(config: PTQConfig, given: object) -> Policies:
    """Checked; a policy's mode and backend give way to the network's, with a warning."""
    if given is None:
        return OrderedDict()
    if not isinstance(given, OrderedDict):
        raise TypeError(f"PTQ: layer_policies must be an OrderedDict, got {type(given).__name__}")
    checked: Policies = OrderedDict()
    items: Mapping[Any, Any] = given
    for pattern, policy in items.items():
        if not isinstance(pattern, str):
            raise TypeError(f"PTQ: a key of layer_policies must be a str, got {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise TypeError(f"PTQ: layer policy {pattern!r} is no regular expression: {error}") from None
        if policy is None:
            checked[pattern] = None
            continue
        if not isinstance(policy, PTQConfig):
            raise TypeError(f"PTQ: layer policy {pattern!r} must be a PTQConfig or None, got {policy!r}")
        _check(policy)
        checked[pattern] = policy
        if policy.kvcache_quant_dtype is not None and config.kvcache_quant_dtype is None:
            warnings.warn(
                f"layer policy {pattern!r}: kvcache_quant_dtype has no effect; give it to the network's config",
                stacklevel=3,
            )
        for name in ("mode", "backend"):
            if getattr(policy, name) is not getattr(config, name):
                wanted = getattr(config, name)
                warnings.warn(f"layer policy {pattern!r}: {name} is {wanted}, the network's", stacklevel=3)
                checked[pattern] = policy = replace(policy, **{name: wanted})
    return checked
