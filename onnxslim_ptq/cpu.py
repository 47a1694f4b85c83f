"""What this machine's processor can do with 8-bit integers."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["int8_features", "saturates"]

_FEATURES = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def int8_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The int8-related instruction sets the processor reports, in a fixed order; empty when it cannot be read."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return []
    flags = next(
        (set(x.split(":", 1)[1].split()) for x in lines if x.lower().startswith(("flags", "features"))), set()
    )
    return [f for f in _FEATURES if f in flags]


def saturates(features: list[str] | None = None, machine: str | None = None) -> bool:
    """Whether u8 x s8 products saturate in 16 bits: x86 without VNNI (vpmaddubsw adds two products into int16).

    Source: ONNX Runtime quantization documentation, "reduce_range". Unknown processors are taken as safe.
    """
    found = int8_features() if features is None else features
    x86 = (machine or platform.machine()).lower() in ("x86_64", "amd64", "i686")
    return x86 and bool(found) and not any("vnni" in f or f == "amx_int8" for f in found)
