"""What the weights JSON beside a quantized model says of it, and the smoothed float model that this describes."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import GraphError
from calib.model import Model
from onnxslim_ptq.export.description import FORMAT
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.key_groups import find_key_groups, smooth_keys
from onnxslim_ptq.graph.opset import PER_CHANNEL_OPSET, raise_opset
from onnxslim_ptq.graph.optimize import optimize
from onnxslim_ptq.graph.smooth_groups import GroupKind, find_groups, smooth

__all__ = ["document_beside", "smoothed_as"]

_MAX_JSON = 256 * 1024**2
_KEYS = "qk"


def document_beside(path: Path | None) -> dict[str, Any] | None:
    """The weights JSON of that model, when there is one beside it."""
    if path is None:
        return None
    beside = path.with_suffix(".json")
    try:
        if not beside.is_file() or beside.stat().st_size > _MAX_JSON:
            return None
        document = json.loads(beside.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and document.get("format") == FORMAT else None


def smoothed_as(source: Model, document: dict[str, Any]) -> Model | None:
    """The float model with the scales and shifts that ``document`` lists, group by group; None when it lists none.

    Raises:
        GraphError: it is the document of another model, or lists what this model does not have.
    """
    entries = document.get("smoothing")
    if not entries:
        return None
    try:
        if document["source"]["sha256"] != source.sha256:
            raise GraphError("they are of another float model")
        graph = Graph(raise_opset(source, PER_CHANNEL_OPSET))
        optimize(graph, document["recipe"].get("passes"))
        for (_, kind), found in groupby(entries, lambda entry: (entry["step"], entry["kind"])):
            _smooth(graph, kind, list(found))
        return graph.to_model()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GraphError(f"they do not fit the model ({type(error).__name__}: {error})") from None


def _smooth(graph: Graph, kind: str, entries: list[dict[str, Any]]) -> None:
    """Groups are found once for all that a step did to one kind of them, as the step found them."""
    if kind == _KEYS:
        keys = {group.nodes: group for group in find_key_groups(graph)}
        for entry in entries:
            smooth_keys(graph, keys[tuple(entry["group"])], np.asarray(entry["scale"], np.float64))
        return
    groups = {tuple(c.node for c in g.consumers): g for g in find_groups(graph, {GroupKind(kind)})}
    for entry in entries:
        shift = entry.get("shift")
        scale = np.asarray(entry["scale"], np.float64)
        smooth(graph, groups[tuple(entry["group"])], scale, None if shift is None else np.asarray(shift))
