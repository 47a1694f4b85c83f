"""Parameters of a quantized network in a safetensors file."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from calib.types import Array
from onnxslim_ptq.core.pack import pack_int4, read_packed, tell_packed, unpack_int4
from onnxslim_ptq.errors import GraphError
from onnxslim_ptq.export.interchange import write_tensors
from onnxslim_ptq.export.read_weights import read_tensors
from onnxslim_ptq.frontends.golden_stick.network import Network
from onnxslim_ptq.frontends.golden_stick.parameters import golden_stick_parameters, packed_parameters

__all__ = ["export_checkpoint", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(network: Network, path: str | Path) -> Path:
    """Write every parameter of the converted network; ValueError while they are placeholders.

    int4 values lie two to a byte (`pack_int4`) where their last axis is even.
    """
    if network.placeholders:
        raise ValueError("the parameters are placeholders; there is nothing to save")
    arrays: dict[str, Array] = {}
    packed: dict[str, str] = {}
    for name, values in network.parameters_dict().items():
        if values.dtype in (ml_dtypes.int4, ml_dtypes.uint4):
            packed[name] = str(values.dtype)
            even = values.ndim > 0 and values.shape[-1] % 2 == 0
            arrays[name] = pack_int4(values) if even else values.astype(np.int8)
        else:
            arrays[name] = values
    (out,) = write_tensors(Path(path), arrays, metadata=tell_packed(packed))
    return out


def export_checkpoint(network: Network, path: str | Path) -> Path:
    """Write the parameters of a QUANTIZE run under Golden Stick's names (`onnxslim_ptq.export.golden_stick`).

    A layer's smoothing is part of its ``input_scale`` then, or of ``smooth_scale`` behind per-token activations. Raises
    ValueError without a QUANTIZE run, GraphError for a layer whose form these names do not have.
    """
    if network.result is None:
        raise ValueError("only the network of a QUANTIZE run knows its scales; apply PTQ in that mode")
    parameters = golden_stick_parameters(network.result)
    packed = packed_parameters(network.result, parameters)
    (out,) = write_tensors(Path(path), parameters, metadata=tell_packed(packed) if packed else None)
    return out


def load_checkpoint(path: str | Path, network: Network) -> None:
    """Fill the converted network from a file that `save_checkpoint` wrote; ValueError when it does not fit."""
    try:
        arrays, metadata = read_tensors(Path(path))
        packed = read_packed(metadata)
    except (GraphError, ValueError) as error:
        raise ValueError(f"'{path}' is no checkpoint of a network: {error}") from None
    known = network.parameters_dict()
    for name, kind in packed.items():
        if name in arrays and name in known:
            whole = arrays[name].shape == known[name].shape
            plain = arrays[name] if whole else unpack_int4(arrays[name], unsigned=kind == "uint4")
            arrays[name] = plain.astype(np.dtype(kind))
    network.load(arrays)
