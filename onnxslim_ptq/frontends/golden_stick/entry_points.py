"""Golden Stick's older entry points: one algorithm each, with narrower rules than `PTQ`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from onnxslim_ptq.frontends.golden_stick.config import PTQConfig
from onnxslim_ptq.frontends.golden_stick.dtypes import (
    BackendTarget,
    OutliersSuppressionType,
    PTQMode,
    QuantGranularity,
    int8,
)
from onnxslim_ptq.frontends.golden_stick.network import Network
from onnxslim_ptq.frontends.golden_stick.ptq import PTQ, Given, Helper, opened

__all__ = ["RoundToNearest", "SmoothQuant"]


class _EntryPoint(PTQ):
    def __init__(self, config: PTQConfig | None = None) -> None:
        name = type(self).__name__
        config = self._default() if config is None else config
        if not isinstance(config, PTQConfig):
            raise TypeError(f"{name}: config must be a PTQConfig, got {type(config).__name__}")
        if config.backend is not BackendTarget.ASCEND:
            raise ValueError(f"{name}: backend must be BackendTarget.ASCEND; PTQ takes NONE as well")
        self._require(config)
        super().__init__(config)

    @classmethod
    def _default(cls) -> PTQConfig:
        return PTQConfig()

    @classmethod
    def _require(cls, config: PTQConfig) -> None:
        raise NotImplementedError


class RoundToNearest(_EntryPoint):
    """Weights to nearest, without data: int8 weights alone, or in DEPLOY mode with per-token activations."""

    @classmethod
    def _require(cls, config: PTQConfig) -> None:
        if config.kvcache_quant_dtype is not None:
            raise ValueError("RoundToNearest: an int8 KV cache needs PTQ")
        if config.weight_quant_dtype is not int8:
            raise ValueError("RoundToNearest: weight_quant_dtype must be int8")
        if config.outliers_suppression is not OutliersSuppressionType.NONE:
            raise ValueError("RoundToNearest: outliers_suppression must be NONE; PTQ takes the others")
        if config.act_quant_dtype is None:
            return
        if config.act_quant_granularity is QuantGranularity.PER_TENSOR:
            raise ValueError("RoundToNearest: int8 activations must be PER_TOKEN; PTQ takes PER_TENSOR")
        if config.mode is not PTQMode.DEPLOY:
            raise ValueError("RoundToNearest: int8 activations go with DEPLOY only")

    def apply(
        self, model: Given, helper: Helper | None = None, datasets: Iterable[Any] | None = None
    ) -> Network:
        """As `PTQ.apply`, but no data is needed: ``datasets`` only measure the result."""
        if datasets is not None or self._config.mode is PTQMode.DEPLOY:
            return super().apply(model, helper, datasets)
        if helper is not None and not callable(helper):
            raise TypeError(f"RoundToNearest.apply: helper must be callable, got {helper!r}")
        return self._apply(model, opened(model), None, deploy=False)


class SmoothQuant(_EntryPoint):
    """Static W8A8 behind SMOOTH, alpha 0.5 unless ``algo_args`` says otherwise."""

    @classmethod
    def _default(cls) -> PTQConfig:
        return PTQConfig(act_quant_dtype=int8, outliers_suppression=OutliersSuppressionType.SMOOTH)

    @classmethod
    def _require(cls, config: PTQConfig) -> None:
        w8a8 = config.weight_quant_dtype is int8 and config.act_quant_dtype is int8
        static = config.act_quant_granularity is QuantGranularity.PER_TENSOR
        smooth = config.outliers_suppression is OutliersSuppressionType.SMOOTH
        if not (w8a8 and static and smooth and config.kvcache_quant_dtype is None):
            raise ValueError(
                "SmoothQuant: takes int8 weights, int8 activations PER_TENSOR, SMOOTH and a float KV cache"
            )

    def __init__(self, config: PTQConfig | None = None) -> None:
        super().__init__(config)
        self._config = replace(self._config, algo_args={"alpha": 0.5, **self._config.algo_args})
