"""Two ways to walk over the columns of a weight matrix that let later codes make up for the errors of earlier ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from onnxslim_ptq.core.rounding import Floats

__all__ = ["descend", "inverse_factor", "order_of", "ordered", "successive"]

_BLOCK = 64
_SETTLED = 1e-3  # share of the codes that still change when another sweep is not worth its time
Numbers = Callable[[int, Floats], tuple[Floats, Floats]]


def inverse_factor(gram: Floats) -> Floats:
    """U, upper triangular, with UᵀU = G⁻¹ (Cholesky), [in, in, 1], or [in, in, out] for one G per row; G is made
    better conditioned until it has one."""
    extra, unit = 0.0, np.eye(gram.shape[-1])
    while True:
        try:
            inverse = np.linalg.inv(np.linalg.cholesky(gram + extra * unit))
            lower = np.linalg.cholesky(np.swapaxes(inverse, -1, -2) @ inverse)
            return per_row(np.swapaxes(lower, -1, -2))
        except np.linalg.LinAlgError:
            extra = max(10 * extra, 1e-8 * float(np.diagonal(gram, axis1=-2, axis2=-1).mean()))


def order_of(gram: Floats) -> NDArray[np.int64]:
    """Columns by falling diag(G); with one G per row, by its mean."""
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    return np.argsort(-diagonal.reshape(-1, gram.shape[-1]).mean(axis=0), kind="stable")


def ordered(gram: Floats, order: NDArray[np.int64]) -> Floats:
    """G with rows and columns in that order."""
    return np.asarray(gram[..., order[:, None], order])


def per_row(matrix: Floats) -> Floats:
    """A matrix as [in, in, 1], or one per row [out, in, in] as [in, in, out]."""
    return np.ascontiguousarray(np.moveaxis(matrix, 0, -1)) if matrix.ndim == 3 else matrix[..., None]


def _mix(matrix: Floats, rows: Floats) -> Floats:
    """Σ_j matrix[j, k] rows[j], [k, out], for a matrix as `per_row` gives it."""
    if matrix.shape[2] == 1:
        return np.asarray(matrix[..., 0].T @ rows)
    return np.asarray(np.einsum("jkr,jr->kr", matrix, rows))


def successive(
    columns: Floats, factor: Floats, numbers: Numbers, low: Floats, high: Floats, block: int
) -> Floats:
    """Codes [in, out] of ``columns`` (the weight transposed, [in, out]; it is overwritten).

    Column j gets its nearest code q within low[j], high[j]; the error e = (w - ŵ) / U_jj is taken out of the columns
    to come, w_k -= U_jk e, at once inside a block and with one product behind it. ``numbers(j, columns)`` gives scale
    and zero point of column j. Source: Frantar et al., GPTQ, ICLR 2023, algorithm 1.
    """
    size = len(columns)
    codes = np.empty(columns.shape)
    for start in range(0, size, block):
        stop = min(start + block, size)
        errors = np.empty((stop - start, columns.shape[1]))
        for j in range(start, stop):
            scale, zero = numbers(j, columns)
            codes[j] = np.clip(np.rint(columns[j] / scale) + zero, low[j], high[j])
            error = (columns[j] - (codes[j] - zero) * scale) / factor[j, j]
            columns[j + 1 : stop] -= factor[j, j + 1 : stop] * error
            errors[j - start] = error
        if stop < size:
            columns[stop:] -= _mix(factor[start:stop, stop:], errors)
    return codes


def descend(
    codes: Floats,
    columns: Floats,
    scale: Floats,
    zero: Floats,
    gram: Floats,
    low: Floats,
    high: Floats,
    sweeps: int,
) -> Floats:
    """Improve ``codes`` [in, out] in place, one column at a time, until hardly any code changes or ``sweeps`` are done.

    With E = W - Ŵ and R = G E, the best step of column j with all others fixed is round(R_j / (G_jj s_j)), clipped
    to low[j], high[j]: Σ e G eᵀ never rises. All arguments are transposed, [in, out].
    """
    error = columns - (codes - zero) * scale
    gram = per_row(gram)
    size = len(codes)
    for _ in range(sweeps):
        changed = 0
        for start in range(0, size, _BLOCK):
            stop = min(start + _BLOCK, size)
            pull = _mix(gram[:, start:stop], error)
            for j in range(start, stop):
                wanted = codes[j] + np.rint(pull[j - start] / (np.maximum(gram[j, j], 1e-30) * scale[j]))
                step = np.clip(wanted, low[j], high[j]) - codes[j]
                if not step.any():
                    continue
                changed += int(np.count_nonzero(step))
                codes[j] += step
                move = step * scale[j]
                error[j] -= move
                pull[j + 1 - start :] -= gram[j + 1 : stop, j] * move
        if changed <= _SETTLED * codes.size:
            break
    return codes
