"""Which calibration samples a run gets: all, or what a tool can live with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def pick(shapes: Sequence[object], same_shape: bool = False, limit: int | None = None) -> list[int]:
    """Positions of the first `limit` samples, with `same_shape` out of the largest group that shares its shapes."""
    chosen = list(range(len(shapes)))
    if same_shape:
        groups: dict[Hashable, list[int]] = {}
        for index, shape in enumerate(shapes):
            groups.setdefault(_key(shape), []).append(index)
        chosen = max(groups.values(), key=len, default=[])
    return chosen[:limit]


def ragged(shapes: Sequence[object]) -> bool:
    """Whether the samples differ in shape."""
    return len({_key(shape) for shape in shapes}) > 1


def _key(shape: object) -> Hashable:
    return tuple(map(_key, shape)) if isinstance(shape, (list, tuple)) else shape
