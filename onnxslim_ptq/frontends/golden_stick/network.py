"""A network on its way: what `PTQ.apply` decided, and after `PTQ.convert` the quantized graph with its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from calib.errors import GraphError
from calib.model import LARGE, Model, mark_external, to_array
from calib.tensors import has_plain_dtype
from calib.types import Array
from onnxslim_ptq.api import Result
from onnxslim_ptq.export.check import check_file, source_files
from onnxslim_ptq.export.files import AtomicFiles, output_paths, write_model

__all__ = ["Network"]

_ASCEND_QUANT, _IN_ATTRIBUTES = "AscendQuant", ("scale", "offset")
_EMBEDDED = 2**31 - 2**20


@dataclass
class Network:
    """``tags``: what is done to each layer and cache; ``placeholders``: parameters that a checkpoint has yet to fill.

    ``quantized`` is None before `PTQ.convert`; ``result`` is what QUANTIZE measured.
    """

    source: Model
    tags: dict[str, str] = field(default_factory=dict)
    pending: Model | None = None
    quantized: Model | None = None
    result: Result | None = None
    placeholders: bool = False
    quant_type: str = ""

    @property
    def model(self) -> onnx.ModelProto:
        """The quantized graph with its parameters inside; ValueError before convert, GraphError above 2 GB."""
        found = self._converted()
        if found.nbytes > _EMBEDDED:
            raise GraphError(
                "the quantized model is above 2 GB, more than one protobuf holds; use save(path)"
            )
        proto = onnx.ModelProto()
        proto.CopyFrom(found.proto)
        for tensor in proto.graph.initializer:
            if tensor.name in found.weights:
                tensor.CopyFrom(onnx.numpy_helper.from_array(_value(found, tensor), tensor.name))
        return proto

    def parameters_dict(self) -> dict[str, Array]:
        """Every parameter of the quantized graph by name; ValueError before convert.

        Those that AscendQuant has as attributes are called ``<node>.scale`` and ``<node>.offset``.
        """
        found = self._converted()
        stored = {tensor.name: _value(found, tensor) for tensor in found.proto.graph.initializer}
        return {**stored, **_attributes(found.proto)}

    def load(self, parameters: Mapping[str, Array]) -> None:
        """Fill every parameter; ValueError naming the first that is missing, unknown, or of another form.

        Nothing is changed when one does not fit.
        """
        known = self.parameters_dict()
        _require_fit(known, parameters)
        found = self._converted()
        proto = onnx.ModelProto()
        proto.CopyFrom(found.proto)
        weights = {}
        for tensor in proto.graph.initializer:
            values = np.ascontiguousarray(parameters[tensor.name]).reshape(known[tensor.name].shape)
            if values.nbytes >= LARGE and has_plain_dtype(tensor.data_type):
                tensor.ClearField("raw_data")
                mark_external(tensor)
                weights[tensor.name] = values
            else:
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        for node in proto.graph.node:
            for attribute in node.attribute if node.op_type == _ASCEND_QUANT else ():
                if attribute.name in _IN_ATTRIBUTES:
                    attribute.f = float(parameters[f"{node.name}.{attribute.name}"])
        size = proto.ByteSize() + sum(w.nbytes for w in weights.values())
        self.quantized, self.placeholders = Model(proto, weights, found.path, size), False

    def save(self, out: str | Path) -> Path:
        """Write the quantized graph, checked and atomically; with QUANTIZE also its weights JSON.

        Raises ValueError while parameters are placeholders.
        """
        found = self._converted()
        if self.placeholders:
            raise ValueError("the parameters are placeholders; load the checkpoint of a QUANTIZE run first")
        if self.result is not None and self.result.quantized is found:
            return self.result.save(out).model
        stem = self.source.path.stem if self.source.path else "model"
        protected = source_files(self.source.path) if self.source.path else []
        with AtomicFiles(output_paths(Path(out), stem, self.quant_type or "float"), protected) as files:
            write_model(found, files.temporary.model)
            check_file(files.temporary.model, source=self.source.path or self.source.proto)
            return files.commit().model

    def _converted(self) -> Model:
        if self.quantized is None:
            raise ValueError("the network is not converted yet; call PTQ.convert first")
        return self.quantized


def _attributes(proto: onnx.ModelProto) -> dict[str, Array]:
    return {
        f"{node.name}.{attribute.name}": np.asarray(attribute.f, np.float32)
        for node in proto.graph.node
        if node.op_type == _ASCEND_QUANT
        for attribute in node.attribute
        if attribute.name in _IN_ATTRIBUTES
    }


def _value(model: Model, tensor: onnx.TensorProto) -> Array:
    return np.asarray(to_array(tensor, model.weights))


def _require_fit(known: Mapping[str, Array], given: Mapping[str, Array]) -> None:
    for what, names in (("lacks", known.keys() - given.keys()), ("has unknown", given.keys() - known.keys())):
        if names:
            raise ValueError(
                f"the checkpoint {what} parameter '{min(names)}' ({len(names)} in all); "
                "DEPLOY needs the model and the fields that QUANTIZE had"
            )
    for name, values in known.items():
        other = given[name]
        if other.dtype != values.dtype or other.shape != values.shape:
            raise ValueError(
                f"parameter '{name}' is {other.dtype}{list(other.shape)} in the checkpoint and "
                f"{values.dtype}{list(values.shape)} in the network"
            )
