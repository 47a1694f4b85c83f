"""The weights JSON: what was quantized how, readable without this package (schema: ``weights.schema.json``)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import save

from calib.types import Array
from onnxslim_ptq.core.spec import (
    BelowTimestep,
    ManyTokens,
    PerToken,
    QParams,
    QuantPlan,
    WeightCodes,
)
from onnxslim_ptq.errors import VerificationError
from onnxslim_ptq.export.files import OutputPaths, create
from onnxslim_ptq.export.plan_names import PlanNames
from onnxslim_ptq.graph.graph import Graph

__all__ = [
    "FORMAT",
    "INLINE",
    "VERSION",
    "Calibration",
    "Context",
    "Description",
    "describe",
    "write_description",
]

FORMAT = "onnxslim_ptq.weights"
VERSION = 1
INLINE = 4096  # values from which on an array goes to the parameters file
Json = Any  # None | bool | int | float | str | list | dict


@dataclass(frozen=True)
class Calibration:
    """Which data the ranges come from; ``samples`` is 0 and ``sha256`` None for a data-free run.

    ``prepared`` tells in words how files became inputs.
    """

    samples: int
    device: str
    sha256: str | None = None
    prepared: Sequence[str] = ()


@dataclass(frozen=True)
class Context:
    """What the plan does not know: where the model came from and how the run was made. Values may hold arrays."""

    source: str  # file name without folder: the JSON must not differ between machines
    source_sha256: str
    quant_type: str
    target: str
    tool: Mapping[str, str]
    recipe: Mapping[str, Json]
    calibration: Calibration
    seed: int = 0
    metrics: Mapping[str, Json] = field(default_factory=dict)
    smoothing: Sequence[Mapping[str, Json]] = ()
    io_changes: Sequence[Mapping[str, Json]] = ()


@dataclass
class Description:
    """The JSON document, and the arrays too long for it under the names that its ``{"ref": name}`` use."""

    document: dict[str, Json] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)

    def array(self, name: str, values: Array) -> Json:
        """The values as a list (a scalar as a list of one), or a reference when there are more than ``INLINE``.

        Raises VerificationError when one is NaN or infinite: such a scale or range must not be shipped.
        """
        flat = np.asarray(values).reshape(-1)
        if flat.dtype.kind == "f" and not np.isfinite(flat).all():
            raise VerificationError(
                f"'{name}' holds NaN or infinite values; exclude its layer or check the samples"
            )
        if flat.size <= INLINE:
            return flat.tolist()
        single = flat.astype(np.float32) if flat.dtype == np.float64 else flat
        self.arrays[name] = np.array(single if np.array_equal(single, flat) else flat).reshape(
            np.shape(values)
        )
        return {"ref": name}

    def numbers(self, name: str, params: QParams) -> dict[str, Json]:
        zero = params.zero_point.astype(params.spec.dtype.dtype)
        return {
            "scale": self.array(f"{name}/scale", params.scale),
            "zero_point": self.array(f"{name}/zero_point", zero),
        }

    def json_bytes(self) -> bytes:
        """The document as UTF-8 text, one entry of each table a line; the same for the same document."""
        return (_text(self.document, depth=2) + "\n").encode("utf-8", "backslashreplace")


def describe(plan: QuantPlan, graph: Graph, rendered: onnx.ModelProto, context: Context) -> Description:
    """Describe ``plan``, which quantizes the float ``graph`` and was written as ``rendered`` (its skeleton will do).

    Raises VerificationError when a scale or range is not finite.
    """
    made = Description()
    names = PlanNames(plan, graph)
    made.document = {
        "format": FORMAT,
        "version": VERSION,
        "model_quant_type": context.quant_type,
        "target": context.target,
        "source": {"file": context.source, "sha256": context.source_sha256},
        "tool": dict(context.tool),
        "recipe": _plain(context.recipe),
        "seed": context.seed,
        "calibration": {
            "samples": context.calibration.samples,
            "device": context.calibration.device,
            "sha256": context.calibration.sha256,
            "prepared": list(context.calibration.prepared),
        },
        "weights": _weights(made, plan, names, rendered),
        "activations": _activations(made, plan, names),
        "biases": _biases(plan, names),
        "smoothing": [
            _with_arrays(made, f"smoothing/{i}", entry) for i, entry in enumerate(context.smoothing)
        ],
        "io_changes": [
            _with_arrays(made, f"io/{entry.get('name', i)}", entry)
            for i, entry in enumerate(context.io_changes)
        ],
        "skipped": dict(plan.skipped),
        "metrics": _metrics(context.metrics),
    }
    return made


def write_description(description: Description, paths: OutputPaths) -> list[Path]:
    """Write the JSON and, when there are long arrays, the parameters file; returns the files written.

    Raises GraphError when the disk refuses.
    """
    files = [(paths.json, description.json_bytes())]
    if description.arrays:
        params = paths.params or paths.json.with_suffix(".params.safetensors")
        files.insert(
            0, (params, save({name: description.arrays[name] for name in sorted(description.arrays)}))
        )
    for path, data in files:
        with create(path) as file:
            file.write(data)
    return [path for path, _ in files]


def _weights(
    made: Description, plan: QuantPlan, names: PlanNames, rendered: onnx.ModelProto
) -> dict[str, Json]:
    nodes = {node.name: node for node in rendered.graph.node}
    producers = {output: node for node in rendered.graph.node for output in node.output}
    entries: dict[str, Json] = {}
    for key, uses in names.weights.items():
        stored, name = plan.weight_codes[key], names.weight[key]
        codes = np.ascontiguousarray(stored.codes)
        read = _initializer_read(nodes.get(uses[0].node), uses[0].port, producers)
        entries[name] = {
            "nodes": [use.node for use in uses],
            "dtype": stored.params.spec.dtype.name,
            "shape": list(codes.shape),
            "axis": None if stored.params.axis is None else stored.params.axis % codes.ndim,
            "block_size": stored.params.block,
            **made.numbers(f"weights/{name}", stored.params),
            "rounder": stored.rounder,
            **_rounding_error(stored),
            "quantized_name": stored.quantized_name or read,
            "sha256": hashlib.sha256(codes.reshape(-1).view(np.uint8).data).hexdigest(),
        }
    return entries


def _rounding_error(stored: WeightCodes) -> dict[str, Json]:
    if stored.error is None:
        return {}
    return {"rounding_error": {"rtn": stored.error[0], "rounder": stored.error[1]}}


def _initializer_read(
    node: onnx.NodeProto | None, port: int, producers: Mapping[str, onnx.NodeProto]
) -> str | None:
    """The initializer that input ``port`` of ``node`` comes from, through DequantizeLinear; None without."""
    if node is None or port >= len(node.input):
        return None
    name = node.input[port]
    while name in producers:
        if not producers[name].input:
            return None
        name = producers[name].input[0]
    return str(name)


# What an activation's numbers wait for: `when` of the recipe.
_WHEN: dict[type, str] = {BelowTimestep: "timestep", ManyTokens: "prefill", type(None): "dynamic"}


def _activations(made: Description, plan: QuantPlan, names: PlanNames) -> dict[str, Json]:
    entries: dict[str, Json] = {}
    dynamic = {slot.params: slot.spec for slot in plan.activations.values() if slot.params not in plan.params}
    switched = {
        s.params: _WHEN[type(g.while_)]
        for s in plan.activations.values()
        if isinstance(g := s.spec.grain, PerToken)
    }
    for (tensor, key), nodes in names.sites.items():
        name = names.activation[(tensor, key)]
        if key in dynamic:
            entries[name] = {
                "nodes": list(dict.fromkeys(nodes)),
                "dtype": dynamic[key].dtype.name,
                "when": "dynamic",
                "axis": None,
                "scale": [],
                "zero_point": [],
                "range": None,
                "method": "per token",
            }
            continue
        params = plan.params[key]
        # Without a recorded range the codes tell it: what the lowest and the highest of them stand for.
        found, method = plan.ranges.get(key) or plan.ranges.get(tensor) or (None, None)
        lo, hi = (found.lo, found.hi) if found is not None else params.range()
        entries[name] = {
            "nodes": list(dict.fromkeys(nodes)),
            "dtype": params.spec.dtype.name,
            "when": switched.get(key, "static"),
            "axis": params.axis,
            **made.numbers(f"activations/{name}", params),
            "range": [_bound(made, f"activations/{name}/lo", lo), _bound(made, f"activations/{name}/hi", hi)],
            "method": method,
            **_rows(made, name, plan.timesteps.get(key)),
        }
    return entries


def _rows(made: Description, name: str, table: Mapping[int, QParams] | None) -> dict[str, Json]:
    """The numbers at each calibrated time step, where they depend on it."""
    if table is None:
        return {}
    steps = sorted(table)
    scales, zeros = (np.stack([getattr(table[s], part) for s in steps]) for part in ("scale", "zero_point"))
    return {
        "timesteps": {
            "steps": steps,
            "scale": made.array(f"activations/{name}/timesteps/scale", scales),
            "zero_point": made.array(f"activations/{name}/timesteps/zero_point", zeros),
        }
    }


def _bound(made: Description, name: str, values: Array) -> Json:
    listed = made.array(name, values)
    return listed[0] if np.ndim(values) == 0 else listed


def _biases(plan: QuantPlan, names: PlanNames) -> dict[str, Json]:
    entries: dict[str, Json] = {}
    for key, uses in names.biases.items():
        bias = plan.bias_codes[key]
        entries[names.bias[key]] = {
            "nodes": [use.node for use in uses],
            "scale_from": [
                names.by_params.get(bias.activation, bias.activation),
                names.weight.get(bias.weight, bias.weight),
            ],
            "dtype": "int32",
            "clipped": bias.clipped,
        }
    return entries


def _metrics(metrics: Mapping[str, Json]) -> dict[str, Json]:
    """The metrics with null for what JSON cannot hold; ``not_finite`` says what each of those was."""
    lost: dict[str, str] = {}
    plain: dict[str, Json] = _plain(metrics, lost=lost)
    return {**plain, "not_finite": lost} if lost else plain


def _plain(value: Json, path: str = "", lost: dict[str, str] | None = None) -> Json:
    """Only what JSON knows: numpy scalars become numbers, NaN and infinities null (``lost``: path -> which)."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{path}/{k}", lost) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{path}/{i}", lost) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if lost is not None:
            lost[path] = str(value)
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _with_arrays(made: Description, name: str, value: Json) -> Json:
    """As ``_plain``, but long arrays go to the parameters file."""
    if isinstance(value, np.ndarray):
        return made.array(name, value)
    if isinstance(value, Mapping):
        return {str(k): _with_arrays(made, f"{name}/{k}", v) for k, v in value.items()}
    return _plain(value)


def _text(value: Json, depth: int) -> str:
    """``value`` as strict JSON, with the entries of its ``depth`` outer tables on lines of their own."""
    if depth == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    indent = " " * (3 - depth)
    lines = [
        f"{indent}{json.dumps(key, ensure_ascii=False)}: {_text(v, depth - 1)}" for key, v in value.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n" + indent[1:] + "}"
