"""``inspect MODEL``: what is in a model and what can be quantized."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxslim_ptq.commands.console import columns, emit_json, program, say, size
from onnxslim_ptq.commands.options import Json, Verbose

if TYPE_CHECKING:
    from onnxslim_ptq.analysis.inspect import Inspection

__all__ = ["inspect"]

_FEW = 12
Model = Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="An ONNX model.")]
Groups = Annotated[
    bool, typer.Option("--groups", help="Layers that can share a smoothing scale, and what absorbs it.")
]
Names = Annotated[
    bool, typer.Option("--names", help="Each layer's node, weight and module name, for patterns.")
]


def inspect(
    model: Model, json: Json = False, groups: Groups = False, names: Names = False, verbose: Verbose = False
) -> None:
    """Show what is in MODEL: operators, shapes, precision, and which layers can be quantized."""
    from onnxslim_ptq.analysis.inspect import inspect_model

    found = inspect_model(model, groups)
    if json:
        emit_json(found.as_json())
    elif groups:
        _show_groups(found, verbose)
    elif names:
        _show_names(found)
    else:
        _show(found, verbose)


def _show(found: Inspection, verbose: bool) -> None:
    count = sum(found.operators.values())
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    say(f"{found.file}: {size(found.bytes)}, {count} nodes, {found.precision}")
    say(f"format: opset {opsets}; IR {found.ir}; made by {found.producer or 'unknown'}")
    if found.external:
        say(f"external data: {', '.join(found.external)}")
    for kind, values in (("input", found.inputs), ("output", found.outputs)):
        for value in values:
            say(f"{kind}: {value['name']}  {value['type']} {_shape(value['shape'])}")
    tops = list(found.operators.items())
    shown = tops if verbose else tops[:_FEW]
    rest = f", and {len(tops) - len(shown)} other kinds" if len(tops) > len(shown) else ""
    say("operators: " + ", ".join(f"{n} {op}" for op, n in shown) + rest)
    constants = [f"{w['count']} {kind} ({size(w['bytes'])})" for kind, w in found.weights.items()]
    say(f"constants: {', '.join(constants) or 'none'}")
    if found.quantized_nodes:
        say(
            f"already quantized: {len(found.quantized_nodes)} nodes (first: {found.quantized_nodes[0]}); quantize "
            "refuses it without --allow-quantized"
        )
    if found.calibration is not None:
        say(
            f"calibrated with: {found.calibration.get('samples')} samples on {found.calibration.get('device')}"
        )
        for line in found.calibration.get("prepared") or ["inputs as they were given"]:
            say(f"  {line}")
    for sub in found.subgraphs if verbose else found.subgraphs[:3]:
        say(f"subgraph: {sub['op']} '{sub['node']}' holds {sub['nodes']} nodes, which stay float")
    if found.functions:
        say(f"local functions: {', '.join(found.functions)}")
    _show_layers(found, verbose)
    for note in found.notes:
        say(f"note: {note}")
    if found.layers:
        say(
            f"next: {program()} quantize {found.file} OUT --calib SAMPLES --dry-run  (what would be quantized)"
        )


def _show_layers(found: Inspection, verbose: bool) -> None:
    from onnxslim_ptq.commands.summary import float_lines

    kinds = Counter(layer.op for layer in found.layers)
    say(
        f"layers that can be quantized: {len(found.layers)}"
        + (f" ({', '.join(f'{n} {op}' for op, n in kinds.most_common())})" if kinds else "")
        + (f"; cannot: {len(found.not_quantizable)}" if found.not_quantizable else "")
    )
    for line in float_lines(found.not_quantizable, verbose):
        say(line)
    for weight, nodes in list(found.shared_weights.items())[: None if verbose else 3]:
        shown = nodes if verbose else nodes[:2]
        more = f" and {len(nodes) - len(shown)} more" if len(nodes) > len(shown) else ""
        say(f"shared weight: {weight} is read by {', '.join(shown)}{more}")


def _show_names(found: Inspection) -> None:
    header: tuple[Any, ...] = ("NODE", "OP", "MODULE", "WEIGHT", "SHAPE")
    rows = [(la.node, la.op, la.module, la.weight, "x".join(map(str, la.shape))) for la in found.layers]
    for line in columns([header, *rows], indent=""):
        say(line)
    for name, reason in found.not_quantizable.items():
        say(f"{name}: float, {reason}")


def _show_groups(found: Inspection, verbose: bool) -> None:
    """A table of all groups, those that only an explicit Mul can serve last, with the reason."""
    groups = found.groups or []
    explicit = [group for group in groups if group.reason]
    rows: list[tuple[object, ...]] = [("KIND", "SOURCE", "LAYERS", "CHANNELS", "SCALES", "SHIFT")]
    for group in [group for group in groups if not group.reason] + explicit:
        layers = group.layers if verbose else group.layers[:1]
        more = f" and {len(group.layers) - len(layers)} more" if len(group.layers) > len(layers) else ""
        shift = "yes" if group.shiftable else "no"
        names = ", ".join(layers) + more
        rows.append((group.kind, group.source, names, group.channels, group.scales, shift))
    for line in columns(rows, right=frozenset({3, 4}), indent=""):
        say(line)
    say(f"{len(groups) - len(explicit)} groups absorb a scale, {len(explicit)} need an explicit Mul")
    for group in explicit if verbose else explicit[:_FEW]:
        say(f"  {group.layers[0]}: {group.reason}")
    if len(explicit) > _FEW and not verbose:
        say(f"  and {len(explicit) - _FEW} more (-v)")
    for note in found.notes:
        say(f"note: {note}")


def _shape(shape: list[int | str | None] | None) -> str:
    if shape is None:
        return "of unknown shape"
    return f"[{', '.join('?' if d is None else str(d) for d in shape)}]" if shape else "scalar"
