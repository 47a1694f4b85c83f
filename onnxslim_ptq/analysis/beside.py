"""What the weights JSON beside a quantized model says of it, and the smoothed float model that this describes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import GraphError
from calib.model import Model
from onnxslim_ptq.export.description import FORMAT
from onnxslim_ptq.export.read_weights import read_tensors
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.key_groups import find_key_groups, smooth_keys
from onnxslim_ptq.graph.opset import PER_CHANNEL_OPSET, raise_opset
from onnxslim_ptq.graph.optimize import optimize
from onnxslim_ptq.graph.smooth_groups import GroupKind, find_groups, smooth
from onnxslim_ptq.graph.split_channels import divides, split_channels

__all__ = ["document_beside", "smoothed_as"]

_MAX_JSON = 256 * 1024**2
_ARRAYS = ".params.safetensors"
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


def smoothed_as(source: Model, quantized: Path | None) -> Model | None:
    """The float model with the scales, shifts and split channels that the weights JSON beside ``quantized`` lists,
    group by group; None when it lists none.

    Raises:
        GraphError: it is of another model, or lists what this model does not have; its file of arrays cannot be read.
    """
    document = document_beside(quantized)
    if quantized is None or document is None or not document.get("smoothing"):
        return None
    try:
        entries = _with_arrays(document["smoothing"], quantized.with_suffix(_ARRAYS))
        if document["source"]["sha256"] != source.sha256:
            raise GraphError("they are of another float model")
        graph = Graph(raise_opset(source, PER_CHANNEL_OPSET))
        optimize(graph, document["recipe"].get("passes"))
        for batch in _batches(entries):
            _smooth(graph, batch[0]["kind"], batch)
        return graph.to_model()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise GraphError(f"they do not fit the model ({type(error).__name__}: {error})") from None


def _with_arrays(entries: list[dict[str, Any]], params: Path) -> list[dict[str, Any]]:
    """The entries with arrays in place of the names that refer to ``params``."""
    named = {value["ref"] for entry in entries for value in entry.values() if isinstance(value, dict)}
    arrays = read_tensors(params, named)[0] if named else {}
    return [
        {key: arrays[value["ref"]] if isinstance(value, dict) else value for key, value in entry.items()}
        for entry in entries
    ]


def _batches(entries: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """What one step did to one kind of groups; the same step once more where a group comes again."""
    batch: list[dict[str, Any]] = []
    for entry in entries:
        same = all(entry[key] == other[key] for other in batch[:1] for key in ("step", "kind"))
        if not same or any(entry["group"] == other["group"] for other in batch):
            yield batch
            batch = []
        batch.append(entry)
    yield batch


def _smooth(graph: Graph, kind: str, entries: list[dict[str, Any]]) -> None:
    """Groups are found once for all that a step did to one kind of them, as the step found them."""
    if kind == _KEYS:
        keys = {group.nodes: group for group in find_key_groups(graph)}
        for entry in entries:
            smooth_keys(graph, keys[tuple(entry["group"])], np.asarray(entry["scale"], np.float64))
        return
    groups = {tuple(c.node for c in g.consumers): g for g in find_groups(graph, {GroupKind(kind)})}
    for entry in entries:
        group = groups[tuple(entry["group"])]
        if entry.get("channels"):
            if not all(divides(graph, layer) for layer in group.consumers):
                raise ValueError(f"channels of {entry['group']} cannot be split off")
            split_channels(graph, group.consumers, entry["channels"])
            continue
        shift = entry.get("shift")
        scale = np.asarray(entry["scale"], np.float64)
        smooth(graph, group, scale, None if shift is None else np.asarray(shift))
