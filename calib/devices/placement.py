"""Proof that a session really computes where it should, and what the CPU computes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import DeviceError
from calib.types import Array

__all__ = ["Placement", "compare", "placement_from_profile", "placement_from_session", "require_placed"]

# ‖device − cpu‖₂ ≤ share · ‖cpu‖₂ + _FLOOR · √n, per output. A right device is 10 to 100 times closer: float32 sums in
# another order differ by 1e-6, float16 ones by 1e-3; a wrong kernel, layout or weight differs by more than 1.
_SHARE = {"float16": 0.05}
_SHARE_FLOAT = 0.01
_FLOOR = 1e-5
_SAME_INTEGERS = 0.99  # an index may flip between equal values


@dataclass(frozen=True)
class Placement:
    """How many nodes run on the device, and how many of which operator on the CPU instead.

    A provider that compiles graphs may count a compiled graph as one node.
    """

    on_device: int
    elsewhere: Mapping[str, int]

    def note(self, device: str) -> str | None:
        """A line for the user when not everything runs on the device."""
        left = sum(self.elsewhere.values())
        if not left:
            return None
        kinds = ", ".join(
            f"{n} {op}" for op, n in sorted(self.elsewhere.items(), key=lambda i: (-i[1], i[0]))[:6]
        )
        more = "" if len(self.elsewhere) <= 6 else ", ..."
        return f"device '{device}': {left} nodes run on the CPU instead ({kinds}{more})"


def placement_from_session(session: Any, provider: str) -> Placement:
    """From the record ONNX Runtime 1.24 and later keep (``session.record_ep_graph_assignment_info``)."""
    here, elsewhere = 0, Counter[str]()
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        if part.ep_name == provider:
            here += len(nodes)
        else:
            elsewhere.update(node.op_type for node in nodes)
    return Placement(here, elsewhere)


def placement_from_profile(path: Path, provider: str) -> Placement:
    """From a profile of one run, which every version writes."""
    here, elsewhere = 0, Counter[str]()
    for event in json.loads(path.read_text()):
        args = event.get("args") or {}
        if event.get("cat") != "Node" or "provider" not in args or not event["name"].endswith("kernel_time"):
            continue
        if args["provider"] == provider:
            here += 1
        else:
            elsewhere[args.get("op_name", "?")] += 1
    return Placement(here, elsewhere)


def require_placed(placement: Placement, device: str) -> None:
    """DeviceError unless a node runs on the device: a session may claim a provider and run everything on the CPU."""
    if placement.on_device == 0:
        kinds = ", ".join(sorted(placement.elsewhere)[:6]) or "an empty graph"
        raise DeviceError(
            f"device '{device}' would compute nothing: its provider takes none of the model's operators ({kinds}); "
            "use --device cpu"
        )


def compare(names: Sequence[str], found: Sequence[Array], exact: Sequence[Array], device: str) -> None:
    """Compare the first batch with the CPU's: ‖device − cpu‖₂ ≤ 0.01 ‖cpu‖₂ + 1e-5 √n per float output.

    0.05 for float16; integers and booleans have to agree in 99 %. Shapes, types and the places of NaN and Inf have to
    be the same. Raises DeviceError naming the output and the difference.
    """
    for name, z, y in zip(names, found, exact, strict=True):
        problem = _difference(np.asarray(z), np.asarray(y))
        if problem:
            raise DeviceError(
                f"device '{device}' computes something else than the CPU: output '{name}' {problem}; its statistics "
                "would be wrong, use --device cpu and report this with the versions of driver and toolkit"
            )


def _difference(z: Array, y: Array) -> str | None:
    if z.shape != y.shape or z.dtype != y.dtype:
        return f"is {z.dtype} {list(z.shape)} instead of {y.dtype} {list(y.shape)}"
    if y.dtype.kind not in "fc":
        same = float(np.mean(z == y)) if y.size else 1.0
        return None if same >= _SAME_INTEGERS else f"agrees in {same:.1%} of its elements"
    finite = np.isfinite(y)
    if not np.array_equal(finite, np.isfinite(z)):
        return "has NaN or Inf in other places"
    wide = np.complex128 if y.dtype.kind == "c" else np.float64
    exact = y[finite].astype(wide)
    error = float(np.linalg.norm(z[finite].astype(wide) - exact))
    signal = float(np.linalg.norm(exact))
    share = _SHARE.get(y.dtype.name, _SHARE_FLOAT)
    if error <= share * signal + _FLOOR * np.sqrt(exact.size):
        return None
    return f"differs by {error / signal:.3g} of its norm" if signal else f"differs by {error:.3g} from 0"
