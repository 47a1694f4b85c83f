"""The user's tensor names for the ids of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from onnxslim_ptq.core.spec import QuantPlan, Result, Use
from onnxslim_ptq.graph.graph import Graph

__all__ = ["PlanNames"]

_K = TypeVar("_K")


class PlanNames:
    """Turns the ids of a plan into the user's tensor names; an entry that would repeat a key gets "#2", "#3", …"""

    def __init__(self, plan: QuantPlan, graph: Graph) -> None:
        self.weights = _readers({use: slot.params for use, slot in plan.weights.items()})
        self.biases = _readers({use: slot.params for use, slot in plan.biases.items()})
        self.weight = _keys(
            {
                key: plan.weight_codes[key].name or _tensor_at(graph, uses[0])
                for key, uses in self.weights.items()
            }
        )
        self.bias = _keys(
            {
                key: plan.bias_codes[key].name or _tensor_at(graph, uses[0])
                for key, uses in self.biases.items()
            }
        )
        self.sites: dict[tuple[str, str], list[str]] = {}
        everywhere = {site.tensor for site in plan.activations if isinstance(site, Result)}
        for site, slot in plan.activations.items():
            tensor = site.tensor if isinstance(site, Result) else _tensor_at(graph, site)
            readers = self.sites.setdefault((tensor, slot.params), [])
            if isinstance(site, Use) and tensor not in everywhere:
                readers.append(site.node)
        self.activation = _keys({pair: pair[0] for pair in self.sites})
        self.by_params = {params: tensor for tensor, params in reversed(self.sites)}


def _readers(slots: Mapping[Use, str]) -> dict[str, list[Use]]:
    readers: dict[str, list[Use]] = {}
    for use, params in slots.items():
        readers.setdefault(params, []).append(use)
    return readers


def _tensor_at(graph: Graph, use: Use) -> str:
    return str(graph.node(use.node).inputs[use.port].name)


def _keys(wanted: Mapping[_K, str]) -> dict[_K, str]:
    """A different name for each key: one that is taken gets a number."""
    taken: dict[str, _K] = {}
    for key, name in wanted.items():
        unique, count = name, 1
        while unique in taken:
            unique, count = f"{name}#{count + 1}", count + 1
        taken[unique] = key
    return {key: name for name, key in taken.items()}
