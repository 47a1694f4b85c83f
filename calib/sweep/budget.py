"""How much memory statistics will hold, and how to serve them in sweeps that each stay below a budget."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from calib.stats.bins import KEYS
from calib.stats.gram import gram_bytes
from calib.sweep.bounds import Facts
from calib.types import Probe

__all__ = ["BUDGET", "split", "state_bytes"]

BUDGET = 1 << 30
_HISTOGRAM = KEYS * 10  # int64 counters, and keys that wait to be counted
_UNKNOWN_CHANNELS = 1024
_SERIES, _SMALL, _PER_CHANNEL = 1 << 16, 1 << 10, 200


def state_bytes(probe: Probe, facts: Facts) -> int:
    """An estimate; tensors whose number of channels is not known before the run count as if it were 1024."""
    if probe.kind == "histogram":
        return _HISTOGRAM
    if probe.kind == "series":
        return _SERIES
    if probe.kind not in ("gram", "rows", "channel", "channel_histogram", "mean"):
        return _SMALL
    options = dict(probe.options)
    channels = _channels(probe, facts)
    window = prod(int(v) for name, v in options.items() if name[0] == "k" and name[1:].isdigit() and v > 0)
    if probe.kind == "gram":
        groups = int(options.get("groups", 1))
        return gram_bytes(channels * window // groups, groups)
    if probe.kind == "rows":
        return int(options.get("rows", 256)) * channels * window * 4
    return channels * (_HISTOGRAM if probe.kind == "channel_histogram" else _PER_CHANNEL)


def _channels(probe: Probe, facts: Facts) -> int:
    if told := int(dict(probe.options).get("channels", 0)):
        return told
    shape = facts.shape(probe.tensor)
    windowed = any(name.startswith("k") for name, _ in probe.options)
    axis = probe.axis if probe.axis is not None else (1 if windowed else -1)
    found = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else 0
    return found if found > 0 else _UNKNOWN_CHANNELS


def split(probes: Sequence[Probe], facts: Facts, budget: int) -> list[list[Probe]]:
    """Cut ``probes``, in their order, into sweeps; one that alone exceeds the budget has a sweep of its own."""
    sweeps: list[list[Probe]] = []
    held = 0
    for probe in probes:
        size = state_bytes(probe, facts)
        if not sweeps or held + size > budget:
            sweeps.append([])
            held = 0
        sweeps[-1].append(probe)
        held += size
    return sweeps
