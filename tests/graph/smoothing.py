"""Blocks of transformers as exporters write them, and the check that smoothing leaves a model's function alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.model import open_model
from calib.types import Array, Feed
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.smooth_groups import GroupKind, SmoothGroup, find_groups, smooth
from tests.graph.models import feed_for, parse, run

__all__ = ["FOLDED", "groups_of", "preserved", "smooth_at_random", "weights"]

FOLDED = frozenset(GroupKind) - {GroupKind.UNFUSED}
SIZES: tuple[dict[str, int], ...] = ({"B": 1, "T": 5}, {"B": 2, "T": 12}, {"B": 4, "T": 3})


def weights(seed: int = 0, dtype: type = np.float32, **shapes: tuple[int, ...]) -> dict[str, Array]:
    """Normal weights; a vector lies around 1, so that norms and biases count."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        made[name] = (values / np.sqrt(shape[0]) if len(shape) > 1 else 1 + 0.3 * values).astype(dtype)
    return made


def groups_of(
    body: str,
    constants: Mapping[str, Array],
    opset: int = 17,
    kinds: Collection[GroupKind] | None = None,
) -> list[SmoothGroup]:
    return find_groups(Graph(open_model(parse(body, constants, opset))), kinds)


def smooth_at_random(
    graph: Graph, kinds: Collection[GroupKind] | None = None, seed: int = 0, spread: float = 10.0
) -> list[SmoothGroup]:
    """Smooth every group with scales log-uniform in [1 / spread, spread], and shifts where it takes them."""
    rng = np.random.default_rng(seed)
    groups = find_groups(graph, kinds)
    for group in groups:
        scale: NDArray[np.float64] = np.exp(rng.uniform(-np.log(spread), np.log(spread), group.scales))
        smooth(graph, group, scale, rng.standard_normal(group.scales) if group.shiftable else None)
    return groups


def preserved(
    proto: onnx.ModelProto, kinds: Collection[GroupKind] | None = None, tolerance: float = 1e-5
) -> list[SmoothGroup]:
    """Smooth all groups at random; fail unless outputs stay the same for several sizes. Returns the groups."""
    graph = Graph(open_model(proto))
    groups = smooth_at_random(graph, kinds)
    after = graph.to_model()
    for seed, sizes in enumerate(SIZES):
        feed: Feed = feed_for(proto, seed, sizes)
        for old, new in zip(run(proto, feed), run(after, feed), strict=True):
            assert old.dtype == new.dtype
            assert np.abs(new - old).max() <= tolerance * np.abs(old).max()
    return groups
