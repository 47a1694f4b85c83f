"""Reads a model file as a stranger would: which files it consists of, and whether the format's checker takes it."""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

from calib.errors import GraphError
from calib.model import open_model
from calib.scope import every_node
from calib.tensors import nested_tensors
from calib.wire import OWN_FILE, read_skeleton
from onnxslim_ptq.errors import VerificationError

__all__ = ["check_file", "source_files"]

_LONGEST = 400
_STANDARD = frozenset({"", "ai.onnx"})


@dataclass(frozen=True)
class _Complaint:
    """What onnx.checker objects to; ``shapes``: the structure is valid, but declared types or shapes contradict."""

    text: str
    shapes: bool

    def resembles(self, other: _Complaint | None) -> bool:
        """Whether ``other`` is the same defect: any contradiction of shapes, or the same sentence on other names."""
        if other is None or self.shapes != other.shapes:
            return False
        return self.shapes or _without_names(self.text) == _without_names(other.text)


def check_file(path: Path, *, source: Path | onnx.ModelProto | None = None) -> list[str]:
    """Check a written model: external data in place, onnx.checker in full with strict shape inference, of any size.

    A defect that ``source`` (the float model) has as well is not held against the result. Returns one line for each
    thing that could not be checked. Raises VerificationError with one line otherwise.
    """
    try:
        reopened = open_model(path)
    except GraphError as error:
        raise VerificationError(f"the written model cannot be read again: {error}") from None
    notes = _unchecked(reopened.proto)
    found = _complaint(path)
    if found is None:
        return notes
    if source is None or not found.resembles(_complaint(source)):
        raise VerificationError(
            f"the written model '{path.name}' fails onnx.checker: {found.text}; exclude the node "
            "it names, and report this as a defect of the quantizer"
        )
    unchecked = "shapes were" if found.shapes else "operators and shapes were"
    return [f"{unchecked} not checked, the float model already fails onnx.checker: {found.text}", *notes]


def source_files(model: Path) -> list[Path]:
    """The model file and every external data file it names that exists; raises GraphError when it cannot be read."""
    try:
        with model.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        proto = onnx.ModelProto.FromString(read_skeleton(memoryview(mapped)).data)
    except GraphError as error:
        raise GraphError(f"model '{model}': {error}") from None
    except Exception as error:  # protobuf's DecodeError lies in a private module
        reason = _one_line(str(error))
        raise GraphError(
            f"model '{model}' cannot be read ({reason}); give the path of an .onnx file"
        ) from None
    tensors = [*proto.graph.initializer, *nested_tensors(proto)]
    names = {e.value for t in tensors for e in t.external_data if e.key == "location" and "\0" not in e.value}
    beside = (model.parent / name for name in sorted(names - {OWN_FILE}))
    return [model, *(path for path in beside if path.is_file())]


def _complaint(model: Path | onnx.ModelProto) -> _Complaint | None:
    try:
        # A path, not a proto: the checker then reads files above 2 GB and looks into external data.
        onnx.checker.check_model(os.fspath(model) if isinstance(model, Path) else model, full_check=True)
    except onnx.shape_inference.InferenceError as error:
        return _Complaint(_one_line(str(error)), shapes=True)
    except Exception as error:  # ValidationError, or what protobuf raises
        return _Complaint(_one_line(str(error)), shapes=False)
    return None


def _unchecked(proto: onnx.ModelProto) -> list[str]:
    """A line for the operators that onnx.checker passes over because their domain is not ONNX's own."""
    own = {function.domain for function in proto.functions}
    other = Counter(
        n.domain
        for n in every_node(proto.graph.node)
        if n.domain not in _STANDARD | own and not onnx.defs.has(n.op_type, n.domain)
    )
    if not other:
        return []
    domains = ", ".join(sorted(other))
    return [
        f"onnx.checker does not know the domain {domains}: {sum(other.values())} nodes were not checked by it"
    ]


def _without_names(text: str) -> str:
    """The sentence without what varies: quoted names, numbers, node and tensor names, and the context after it."""
    sentence = text.split(" ==> Context")[0].split(" of node:")[0]
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+|tensor name: \S+", "…", sentence)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST]
