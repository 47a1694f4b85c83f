"""Whose statistics these are: the model, the samples, and what else their values depend on."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from calib.model import Model
from calib.provider import SessionOptions, runtime
from calib.readers import fingerprint
from calib.saved.container import Header
from calib.types import Dataset, Sample

__all__ = ["Conditions", "ModelRef", "Shard", "conditions"]


class ModelRef(Header):
    """The model as the user gave it."""

    file: str
    sha256: str

    @classmethod
    def of(cls, model: Model) -> ModelRef:
        return cls(file=model.path.name if model.path else "", sha256=model.sha256)


class Shard(Header):
    """The samples of one run: their `fingerprint`, how many there are, and 1 + the highest sample number."""

    sha256: str
    samples: int = Field(ge=1)
    numbers: int = Field(ge=1)

    @classmethod
    def of(cls, data: Dataset) -> Shard:
        """From one pass over ``data``."""
        seen = _Watched(data)
        return cls(sha256=fingerprint(seen), samples=len(data), numbers=seen.highest + 1)


@dataclass
class _Watched:
    """Passes samples through and remembers the highest number."""

    data: Dataset
    highest: int = 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Sample]:
        for sample, feed in self.data:
            self.highest = max(self.highest, sample.index)
            yield sample, feed


class Conditions(Header):
    """What the values may depend on besides model and data."""

    device: str
    threads: int
    optimize: str
    onnxruntime: str
    numpy: str
    machine: str


def conditions(device: str, options: SessionOptions) -> Conditions:
    """The conditions of a sweep that starts now."""
    return Conditions(
        device=device,
        threads=options.threads,
        optimize=options.optimize,
        onnxruntime=runtime().__version__,
        numpy=np.__version__,
        machine=platform.machine(),
    )
