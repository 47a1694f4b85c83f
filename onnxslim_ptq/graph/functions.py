"""Replaces calls of local functions by their bodies, so that the layers inside them can be quantized."""

from __future__ import annotations

import onnx
from onnx.inliner import inline_local_functions

from calib.errors import GraphError
from calib.model import Model, lift_constants

__all__ = ["inline_functions"]


def inline_functions(model: Model) -> Model:
    """The model without local functions, or ``model`` itself when it has none; weights stay where they are.

    Raises:
        GraphError: a function's body cannot be put in the place of its call.
    """
    if not model.proto.functions:
        return model
    try:
        proto: onnx.ModelProto = inline_local_functions(model.proto, convert_version=True)
    except Exception as error:  # RuntimeError or ConvertError
        reason = " ".join(str(error).split())[:200]
        raise GraphError(
            f"the model's local functions cannot be inlined: {reason}; export it without functions"
        ) from None
    lift_constants(proto.graph)
    return Model(proto, dict(model.weights), model.path, model.nbytes)
