"""Ways to turn statistics of a tensor into the interval it is quantized on."""

from __future__ import annotations

from calib.ranges.easy_quant import EasyQuant
from calib.ranges.ema import Ema
from calib.ranges.entropy import Entropy
from calib.ranges.grid import Grid
from calib.ranges.histogram import Histogram
from calib.ranges.mean_minmax import MeanMinMax
from calib.ranges.minmax import MinMax
from calib.ranges.mixed import Mixed
from calib.ranges.mse import Mse
from calib.ranges.msmodelslim import MsModelSlim
from calib.ranges.per_channel import RangeMethod, per_channel
from calib.ranges.percentile import Percentile
from calib.ranges.recall_window import RecallWindow
from calib.ranges.sigma import Sigma

__all__ = [
    "RANGES",
    "EasyQuant",
    "Ema",
    "Entropy",
    "Grid",
    "Histogram",
    "MeanMinMax",
    "MinMax",
    "Mixed",
    "MsModelSlim",
    "Mse",
    "Percentile",
    "RangeMethod",
    "RecallWindow",
    "Sigma",
    "per_channel",
]

RANGES: dict[str, type[RangeMethod]] = {
    "easy_quant": EasyQuant,
    "ema": Ema,
    "entropy": Entropy,
    "histogram": Histogram,
    "mean_minmax": MeanMinMax,
    "minmax": MinMax,
    "mixed": Mixed,
    "mse": Mse,
    "msmodelslim": MsModelSlim,
    "percentile": Percentile,
    "recall_window": RecallWindow,
    "sigma": Sigma,
}
