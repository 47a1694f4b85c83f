"""Parameters of a quantized network in a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from calib.types import Array
from onnxslim_ptq.errors import QuantizationError
from onnxslim_ptq.export.files import AtomicFiles, create, output_paths
from onnxslim_ptq.frontends.golden_stick.network import Network

__all__ = ["load_checkpoint", "pack_int4", "save_checkpoint", "unpack_int4"]

_PACKED = "packed_int4"


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
            arrays[name] = np.ascontiguousarray(values).reshape(values.shape)  # scalars stay scalars
    out = Path(path)
    data = save(arrays, metadata={_PACKED: json.dumps(packed, sort_keys=True)})
    hidden = output_paths(out.with_name(f"{out.name}.onnx"), "", "")
    with AtomicFiles(hidden) as files:
        with create(files.folder / out.name) as file:
            file.write(data)
        (files.folder / out.name).replace(out)
    return out


def load_checkpoint(path: str | Path, network: Network) -> None:
    """Fill the converted network from a file that `save_checkpoint` wrote; ValueError when it does not fit."""
    try:
        with safe_open(str(path), "numpy") as file:
            packed = json.loads((file.metadata() or {}).get(_PACKED, "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path}' is no checkpoint of a network: {error}") from None
    known = network.parameters_dict()
    for name, kind in packed.items():
        if name in arrays and name in known:
            whole = arrays[name].shape == known[name].shape
            plain = arrays[name] if whole else unpack_int4(arrays[name], unsigned=kind == "uint4")
            arrays[name] = plain.astype(np.dtype(kind))
    network.load(arrays)


def pack_int4(codes: Array) -> Array:
    """Two neighbours along the last axis in one byte, the first in the low nibble: int8 [..., n / 2].

    Source: Golden Stick's qint4x2 weights, [ic, oc / 2].
    """
    if codes.shape[-1] % 2:
        raise QuantizationError(f"int4 codes of shape {list(codes.shape)} have no pairs along the last axis")
    nibbles = codes.astype(np.int8).astype(np.uint8) & 0xF
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view(np.int8)


def unpack_int4(packed: Array, *, unsigned: bool = False) -> Array:
    """What `pack_int4` packed, as int8 (uint8 for ``unsigned``)."""
    raw = packed.view(np.uint8)
    nibbles = np.stack([raw & 0xF, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)
    if unsigned:
        return nibbles
    return ((nibbles ^ 8).astype(np.int8) - 8).astype(np.int8)
