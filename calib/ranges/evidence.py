"""Picking the statistic a range method needs out of what was gathered for a tensor."""

from __future__ import annotations

from collections.abc import Mapping

from calib.errors import CalibrationError
from calib.ranges.grid import Grid
from calib.stats.bins import Bins
from calib.stats.histogram import HistogramStats
from calib.stats.minmax import MinMaxStats
from calib.stats.series import SeriesStats
from calib.types import Stats

__all__ = ["bins_for", "extent_of", "histogram_of", "series_of"]


def extent_of(stats: Mapping[str, Stats]) -> MinMaxStats:
    """Return exact extremes, from ``minmax`` or else ``histogram``; CalibrationError when none or nothing seen."""
    found = stats.get("minmax", stats.get("histogram"))
    extent = found.extent if isinstance(found, HistogramStats) else found
    if not isinstance(extent, MinMaxStats):
        raise _missing("minmax", stats)
    if extent.count == 0:
        raise CalibrationError("no finite value was seen, so there is no range")
    return extent


def histogram_of(stats: Mapping[str, Stats]) -> HistogramStats:
    """Return the histogram; CalibrationError when it was not gathered."""
    found = stats.get("histogram")
    if not isinstance(found, HistogramStats):
        raise _missing("histogram", stats)
    return found


def bins_for(stats: Mapping[str, Stats], grid: Grid) -> Bins:
    """Return the bins of |x| for a symmetric grid, of x otherwise; CalibrationError when nothing was seen."""
    histogram = histogram_of(stats)
    return histogram.magnitudes() if grid.symmetric else histogram.bins()


def series_of(stats: Mapping[str, Stats]) -> SeriesStats:
    """Return the per-sample series; CalibrationError when it was not gathered or nothing was seen."""
    found = stats.get("series")
    if not isinstance(found, SeriesStats):
        raise _missing("series", stats)
    if len(found) == 0:
        raise CalibrationError("no finite value was seen, so there is no range")
    return found


def _missing(kind: str, stats: Mapping[str, Stats]) -> CalibrationError:
    return CalibrationError(
        f"this range needs the statistic {kind!r}; gathered: {', '.join(sorted(stats)) or 'none'}"
    )
