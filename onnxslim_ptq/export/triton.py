"""A Triton model repository: the version folder and a config.pbtxt with the model's own names, types and dims."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx
from onnx import TensorProto

from calib.errors import GraphError
from calib.model import Model
from onnxslim_ptq.export.files import EMBEDDED_LIMIT, create, write_model

__all__ = ["free_entry", "staged_triton", "triton_config"]

_TYPES: dict[int, str] = {
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.UINT16: "TYPE_UINT16",
    TensorProto.UINT32: "TYPE_UINT32",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.STRING: "TYPE_STRING",
}
MAX_BATCH = 8


def triton_config(model: Model, name: str, max_batch: int = MAX_BATCH) -> str:
    """The text of config.pbtxt for Triton's ONNX Runtime backend.

    Where every input and output starts with the same dynamic dimension, requests are batched (``max_batch_size`` and
    ``dynamic_batching``) and ``dims`` leave it out; else ``max_batch_size`` is 0. A dynamic dimension is -1.

    Raises:
        GraphError: an input or output is no tensor, or has a type that Triton does not know.
    """
    inputs = [
        i for i in model.proto.graph.input if i.name not in {t.name for t in model.proto.graph.initializer}
    ]
    outputs = list(model.proto.graph.output)
    batched = _batched([*inputs, *outputs])
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {max_batch if batched else 0}",
    ]
    for kind, values in (("input", inputs), ("output", outputs)):
        lines += [f"{kind} [", ",\n".join(_tensor(v, batched) for v in values), "]"]
    if batched:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def free_entry(folder: Path, name: str) -> Path:
    """Where a repository takes a model of that name (other characters than letters, digits, _ . - become _).

    GraphError when something is there already.
    """
    final = folder / (re.sub(r"[^A-Za-z0-9_.-]", "_", name) or "model")
    if final.exists():
        raise GraphError(f"'{final}' exists already; remove it or choose another --triton folder")
    return final


@contextmanager
def staged_triton(model: Model, folder: Path, name: str) -> Iterator[Callable[[], Path]]:
    """Write ``folder/name/config.pbtxt`` and ``1/model.onnx`` (external data beside it) there under a hidden name.

    The function that is given makes all of it appear at once and returns its path; what did not appear is removed.
    Raises GraphError when the place is taken or the disk refuses.
    """
    final = free_entry(folder, name)
    config = triton_config(model, final.name)
    hidden: Path | None = None
    try:
        with _disk_errors(folder):
            folder.mkdir(0o750, parents=True, exist_ok=True)
            hidden = Path(tempfile.mkdtemp(".tmp", f".{final.name[:40]}.", folder))
            (hidden / "1").mkdir(0o750)
            write_model(model, hidden / "1" / "model.onnx", external=model.nbytes > EMBEDDED_LIMIT)
            with create(hidden / "config.pbtxt") as file:
                file.write(config.encode())
            hidden.chmod(0o750)
        yield partial(_publish, hidden, final)
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)


def _publish(hidden: Path, final: Path) -> Path:
    with _disk_errors(final.parent):
        os.rename(hidden, final)
    return final


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GraphError(
            f"'{folder}' cannot be written ({error.strerror}); choose another --triton folder"
        ) from None


def _batched(values: Sequence[onnx.ValueInfoProto]) -> bool:
    firsts = set()
    for value in values:
        dims = value.type.tensor_type.shape.dim
        if not value.type.tensor_type.HasField("shape") or not dims or dims[0].HasField("dim_value"):
            return False
        firsts.add(dims[0].dim_param)
    return len(firsts) == 1 and bool(firsts - {""})


def _tensor(value: onnx.ValueInfoProto, batched: bool) -> str:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type not in _TYPES or not kind.HasField("shape"):
        raise GraphError(
            f"'{value.name}' is no tensor of a known rank and type; Triton cannot serve this model"
        )
    dims = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim][int(batched) :]
    listed = ", ".join(map(str, dims or [1]))
    # A scalar: Triton takes an empty reshape in models that batch only, and [ 1 ] for it in the others.
    reshape = "\n    reshape { shape: [ ] }" if batched and not dims else ""
    return (
        f"  {{\n    name: {json.dumps(value.name)}\n    data_type: {_TYPES[kind.elem_type]}\n"
        f"    dims: [ {listed} ]{reshape}\n  }}"
    )
