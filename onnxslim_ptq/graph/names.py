"""What a layer was called in the training framework: `blocks.0.attn.to_q` for the weight `blocks.0.attn.to_q.weight`.

In this order: a name the user gives; the weight's name without ``.weight``, unless an exporter made it up; the module
scope that torch's dynamo exporter notes at the node; the path in the node's name
(``/block1/expand/expand.0/Conv`` is module ``block1.expand.0``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.linears import Linear

__all__ = ["module_name", "module_names", "noted_scope"]

_SUFFIX = re.compile(r"[._/](weight|kernel|w)(_\d+)?$", re.IGNORECASE)
_MADE_UP = re.compile(r"(onnx::|const_fold_opt|\d+$|_v_\d+)|^[A-Za-z]+_\d+$")
_SCOPES = "pkg.torch.onnx.name_scopes"
_LONGEST = 4096  # characters of a scope that are looked at


def module_names(
    graph: Graph, layers: Sequence[Linear], given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The module of each layer, by node name; no two are equal: the second of a name gets ``#2``.

    Raises:
        RecipeError: ``given`` (node -> module) names a node that is no layer, or one module twice.
    """
    given = given or {}
    nodes = [layer.node for layer in layers]
    for node, module in given.items():
        if node not in nodes:
            some = ", ".join(repr(n) for n in nodes[:3])
            raise RecipeError(f"names: node '{node}' is no layer; layers are named like {some}")
        if sum(other == module for other in given.values()) > 1:
            raise RecipeError(f"names: module '{module}' is given to several nodes; give each its own")
    names: dict[str, str] = dict(given)
    taken = set(given.values())
    for layer in layers:
        if layer.node in given:
            continue
        base = module_name(layer.weight_name, layer.node, noted_scope(graph, layer.node))
        unique, count = base, 1
        while unique in taken:
            count += 1
            unique = f"{base}#{count}"
        taken.add(unique)
        names[layer.node] = unique
    return {node: names[node] for node in nodes}


def module_name(weight: str, node: str, scope: str = "") -> str:
    """The module a layer was; ``scope`` is what the exporter noted at its node."""
    if _SUFFIX.search(weight) and not _MADE_UP.search(_SUFFIX.sub("", weight)[:12]):
        return _SUFFIX.sub("", weight)
    if scope:
        return scope
    parts: list[str] = []
    path = [p for p in node.split(";")[0].split("/") if p]
    for part in path[:-1] if path and path[-1][0].isupper() else path:
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts) or _SUFFIX.sub("", weight)


def noted_scope(graph: Graph, node: str) -> str:
    """The innermost module of ``['', 'blocks.0', 'blocks.0.fc', 'linear_3']``, whose last entry is the node itself."""
    noted = {p.key: p.value for p in graph.export_node(graph.node(node)).metadata_props}
    scopes: list[str] = re.findall(r"'([^']*)'", noted.get(_SCOPES, "")[:_LONGEST])
    return scopes[-2] if len(scopes) > 1 else ""
