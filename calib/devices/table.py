"""Which devices there are: how each is named, which execution provider serves it, and what its sessions need."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from calib.devices import cann
from calib.errors import DeviceError

__all__ = ["ACCELERATORS", "CPU", "Accelerator", "Device"]

CPU = "CPUExecutionProvider"
Version = tuple[int, int]


@dataclass(frozen=True)
class Accelerator:
    """A kind of device beside the CPU.

    ``options`` gives, for a device number and a version of ONNX Runtime, the provider options to try in order (the
    next only when the provider does not know the name of one). ``explain`` turns what ONNX Runtime raised and
    logged into a reason and a cure. ``fixed_shapes``: one session per input shape. ``basic``: at most the basic graph
    optimizations, because the others make operators that the provider lacks. ``most_bytes``: of model and weights.
    ``install`` is the cure for a build of ONNX Runtime that lacks the provider (it follows on naming that build).
    """

    provider: str
    options: Callable[[int, Version], tuple[Mapping[str, str], ...]]
    explain: Callable[[str, str], str]
    install: str
    fixed_shapes: bool = False
    basic: bool = False
    most_bytes: int | None = None


def _cuda_options(index: int, version: Version) -> tuple[Mapping[str, str], ...]:
    """TF32 off: it keeps 10 bits of mantissa. Heuristic search: the exhaustive one repeats for every new shape."""
    return ({"device_id": str(index), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},)


def _explain_cuda(text: str, log: str) -> str:
    missing = re.search(r"(lib(?:cu|nv)[\w-]*\.so[\w.]*): cannot open", f"{text}\n{log}")
    if missing:
        return f"{missing[1]} is not found; install the CUDA and cuDNN versions that this onnxruntime needs"
    return f"{cann.shortened(text)}; check nvidia-smi, and that CUDA and cuDNN fit this onnxruntime"


ACCELERATORS: dict[str, Accelerator] = {
    "npu": Accelerator(
        "CANNExecutionProvider",
        cann.options,
        cann.explain,
        "uninstall it and pip install 'onnxslim_ptq[cann]' on a host with the CANN toolkit",
        fixed_shapes=True,
        basic=True,
        most_bytes=2**31 - 2**20,  # the provider hands the graph compiler one protobuf, weights inside
    ),
    "cuda": Accelerator(
        "CUDAExecutionProvider",
        _cuda_options,
        _explain_cuda,
        "uninstall it and pip install onnxruntime-gpu on a host with CUDA",
    ),
}


@dataclass(frozen=True)
class Device:
    """A parsed device name: ``cpu``, ``npu[:ID]`` or ``cuda[:ID]``."""

    kind: str
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Device:
        """Raises DeviceError for any other text."""
        found = re.fullmatch(r"(cpu|npu|cuda)(?::([0-9]{1,4}))?", text)
        if found is None or (found[1] == "cpu" and found[2]):
            raise DeviceError(f"device '{text}' is unknown; use cpu, npu[:ID] or cuda[:ID]")
        return cls(found[1], int(found[2] or 0))

    @property
    def accelerator(self) -> Accelerator:
        return ACCELERATORS[self.kind]

    @property
    def provider(self) -> str:
        return CPU if self.kind == "cpu" else self.accelerator.provider

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"
