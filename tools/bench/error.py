"""How far a model's outputs are from the float model's, independent of what the tool says about itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Noise:
    """Pooled signal and noise per output: SQNR = 10 log10(Σ y² / Σ (y - z)²) over all samples, float outputs only."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._signal = [0.0] * len(self._names)
        self._noise = [0.0] * len(self._names)

    def add(self, exact: Sequence[np.ndarray], seen: Sequence[np.ndarray]) -> None:
        """One sample; ValueError when an output is missing, has another shape, or is NaN where the float one is not."""
        if len(exact) != len(seen):
            raise ValueError(f"{len(seen)} outputs instead of {len(exact)}")
        for index, (y, z) in enumerate(zip(exact, seen, strict=True)):
            if y.shape != z.shape:
                raise ValueError(f"output {self._names[index]!r} has shape {z.shape} instead of {y.shape}")
            if y.dtype.kind == "f":
                self._add(index, y.astype(np.float64).ravel(), z.astype(np.float64).ravel())

    def _add(self, index: int, y: np.ndarray, z: np.ndarray) -> None:
        known = np.isfinite(y)
        y, z = y[known], z[known]
        if not np.isfinite(z).all():
            raise ValueError(f"output {self._names[index]!r} has NaN or Inf where the float model has none")
        self._signal[index] += float(y @ y)
        self._noise[index] += float((y - z) @ (y - z))

    def worst(self) -> float | None:
        """The smallest SQNR in dB of the outputs with a signal; 200 stands for no difference at all."""
        pairs = [(s, n) for s, n in zip(self._signal, self._noise, strict=True) if s > 0]
        return min((10 * float(np.log10(s / n)) if n > 0 else 200.0 for s, n in pairs), default=None)


class Paired:
    """How much the losses of the same predictions grew: their mean and its standard error, s / sqrt(n)."""

    def __init__(self) -> None:
        self._growths: list[np.ndarray] = []

    def add(self, growth: np.ndarray) -> None:
        """The differences of one sample's losses."""
        self._growths.append(np.asarray(growth, np.float64).ravel())

    def metrics(self) -> dict[str, float]:
        """``loss_growth`` and ``loss_growth_error``; nothing without at least two predictions."""
        growths = np.concatenate(self._growths) if self._growths else np.empty(0)
        if growths.size < 2:
            return {}
        error = float(growths.std(ddof=1)) / float(np.sqrt(growths.size))
        return {"loss_growth": float(growths.mean()), "loss_growth_error": error}
