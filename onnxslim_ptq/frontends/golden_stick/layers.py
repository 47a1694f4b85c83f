"""The layers and caches of a network under the names that blacklists and policies speak of."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calib.model import Model
from onnxslim_ptq.core.cache import CachePair
from onnxslim_ptq.frontends.golden_stick.config import PTQConfig
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.kv_cache import find_cache
from onnxslim_ptq.graph.linears import find_linears
from onnxslim_ptq.graph.names import module_names
from onnxslim_ptq.graph.opset import PER_CHANNEL_OPSET, raise_opset
from onnxslim_ptq.graph.optimize import optimize

__all__ = ["Cell", "Policies", "assign", "caches_of", "cells_of"]

Policies = OrderedDict[str, PTQConfig | None]


@dataclass(frozen=True)
class Cell:
    """A layer: its node's name, and its module's, such as ``layers.0.self_attn.q_proj``."""

    node: str
    name: str

    def hit(self, entries: Sequence[str]) -> bool:
        """Whether any entry is part of a name; case counts."""
        return any(entry in name for entry in entries for name in (self.name, self.node))


def cells_of(model: Model) -> list[Cell]:
    """Every layer that can be quantized, in graph order."""
    graph = Graph(raise_opset(model, PER_CHANNEL_OPSET))
    optimize(graph)
    names = module_names(graph, find_linears(graph)[0])
    return [Cell(node, name) for node, name in names.items()]


def caches_of(model: Model) -> list[CachePair]:
    """The pairs of past and present keys and values."""
    return find_cache(Graph(model))


def assign(
    cells: Sequence[Cell], config: PTQConfig, policies: Mapping[str, PTQConfig | None]
) -> list[tuple[Cell, PTQConfig]]:
    """Each layer to be quantized with the policy whose regular expression matches the start of its name, else with
    ``config``; without those whose policy is None and those on the blacklist.

    Raises RuntimeError when two policies match one layer.
    """
    found = []
    for cell in cells:
        hits = [pattern for pattern in policies if re.match(pattern, cell.name)]
        if len(hits) > 1:
            raise RuntimeError(f"layer '{cell.name}' matches two layer policies, {hits[0]!r} and {hits[1]!r}")
        chosen = policies[hits[0]] if hits else config
        if chosen is not None and not cell.hit(chosen.opname_blacklist):
            found.append((cell, chosen))
    return found
