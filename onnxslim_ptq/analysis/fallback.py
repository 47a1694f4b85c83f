"""Which entries to leave float so that a goal is met with few multiply-accumulates in float, on a `Switchboard`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from onnxslim_ptq.analysis.entries import Entry

__all__ = ["cheapest", "fewest_in_order", "prune"]

Predict = Callable[[Collection[str]], float]  # names of float entries -> the goal's metric
_STEPS = 40


def fewest_in_order(order: Sequence[Entry], predict: Predict, bound: float) -> int:
    """The smallest n for which leaving the first n entries float reaches ``bound``, by bisection; len(order) when none.

    The metric grows with n but for noise, which the real runs that follow make up for.
    """
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if predict([entry.name for entry in order[:middle]]) >= bound:
            high = middle
        else:
            low = middle + 1
    return low


def prune(
    floats: Sequence[Entry], macs: Mapping[str, int], predict: Predict, bound: float, steps: int = _STEPS
) -> list[Entry]:
    """``floats`` without the entries that the goal does not need, the costliest first, ``steps`` of them at most."""
    kept = list(floats)
    for entry in sorted(floats, key=lambda entry: -macs[entry.name])[:steps]:
        rest = [other for other in kept if other is not entry]
        if predict([other.name for other in rest]) >= bound:
            kept = rest
    return kept


def cheapest(
    order: Sequence[Entry],
    noise: Mapping[str, float],
    macs: Mapping[str, int],
    predict: Predict,
    bound: float,
) -> list[Entry]:
    """Entries to leave float, of two ways the one with fewer multiply-accumulates: the first of ``order``, or the first
    by noise per multiply-accumulate; each as few as reach ``bound``, then pruned."""
    by_gain = sorted(order, key=lambda entry: -noise[entry.name] / max(macs[entry.name], 1))
    found = []
    for ranking in (order, by_gain):
        count = fewest_in_order(ranking, predict, bound)
        found.append(prune(ranking[:count], macs, predict, bound))
    return min(found, key=lambda chosen: sum(macs[entry.name] for entry in chosen))
