"""Reading ``Probe.options``: every statistic names the options it accepts, anything else is an error."""

from __future__ import annotations

from collections.abc import Mapping

from calib.errors import CalibrationError
from calib.types import Probe

__all__ = ["options_of"]


def options_of(probe: Probe, defaults: Mapping[str, float]) -> dict[str, float]:
    """Return the probe's options over ``defaults``.

    Raises CalibrationError naming the tensor, the unknown option and the accepted ones.
    """
    unknown = [name for name, _ in probe.options if name not in defaults]
    if unknown:
        accepted = ", ".join(sorted(defaults)) or "none"
        raise CalibrationError(
            f"probe {probe.kind!r} of tensor {probe.tensor!r}: unknown option {unknown[0]!r} (accepted: {accepted})"
        )
    return {**defaults, **dict(probe.options)}
