"""The window of a convolution, and the rows it cuts out of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.types import Array

__all__ = ["PATCH_OPTIONS", "Patch"]

_SPATIAL = 3  # Conv1d to Conv3d
PATCH_OPTIONS = {f"{key}{i}": 0.0 for i in range(_SPATIAL) for key in "ksdbe"}


@dataclass(frozen=True)
class Patch:
    """The window of a convolution, one entry per spatial axis (outermost first); empty for MatMul and Gemm."""

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def options(self) -> tuple[tuple[str, float], ...]:
        """The window as probe options ``k0, s0, d0, b0, e0, k1, …``."""
        axes = zip(self.kernel, self.strides, self.dilations, self.begin, self.end, strict=True)
        return tuple(
            (f"{key}{i}", float(v))
            for i, values in enumerate(axes)
            for key, v in zip("ksdbe", values, strict=True)
        )

    @classmethod
    def from_options(cls, options: Mapping[str, float]) -> Patch:
        """The inverse of `options`; a kernel of 0 means "no such axis"."""
        rank = sum(1 for i in range(_SPATIAL) if options.get(f"k{i}", 0) > 0)
        return cls(*(tuple(int(options[f"{key}{i}"]) for i in range(rank)) for key in "ksdbe"))

    def places(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """How many windows fit along each spatial axis."""
        axes = zip(sizes, self.kernel, self.strides, self.dilations, self.begin, self.end, strict=True)
        return tuple(max(0, (n + b + e - d * (k - 1) - 1) // s + 1) for n, k, s, d, b, e in axes)

    def take(self, x: Array, images: NDArray[np.int64], places: NDArray[np.int64]) -> Array:
        """Windows [n, C * window] (C-order [C, *window]) of x [N, C, *sizes]: of image ``images[i]`` the one at
        ``places[i]`` (int [n, axes]); what lies outside the image is zero."""
        axes = range(len(self.kernel))
        where = [
            places[:, i, None] * self.strides[i]
            - self.begin[i]
            + np.arange(self.kernel[i]) * self.dilations[i]
            for i in axes
        ]
        shaped = [(len(places), *(k if i == j else 1 for j, k in enumerate(self.kernel))) for i in axes]
        index = [w.clip(0, n - 1).reshape(s) for w, n, s in zip(where, x.shape[2:], shaped, strict=True)]
        image = images.reshape(-1, *[1] * len(axes))
        where_all: tuple[object, ...] = (image, slice(None), *index)
        found: Array = x[where_all]  # type: ignore[index]  # [n, *window, C]
        for w, n, s in zip(where, x.shape[2:], shaped, strict=True):
            if w.min(initial=0) < 0 or w.max(initial=0) >= n:
                found = np.where(((w >= 0) & (w < n)).reshape(*s, 1), found, np.zeros((), found.dtype))
        return np.moveaxis(found, -1, 1).reshape(len(places), -1)
