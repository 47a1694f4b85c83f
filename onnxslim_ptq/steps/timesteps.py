"""Numbers of static activations at each time step of a diffusion model.

Samples carry the tag ``timestep_idx``. They are gathered from the highest step down, and a step's numbers are those of
its own samples and of all higher steps. Source: msModelSlim, w8a8_timestep. Each static step uses its own numbers, as
MindIE-SD does with the tensors [T, 1] and [T, out]; msModelSlim's own check uses those of the threshold for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from calib.errors import CalibrationError
from calib.readers import subset
from calib.types import Probe, Range, Stats
from onnxslim_ptq.core.spec import TIMESTEP, BelowTimestep
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.steps.placement import PlacedTensor
from onnxslim_ptq.steps.ranges import fixed_range, range_probes
from onnxslim_ptq.workspace import Workspace

__all__ = ["timestep_ranges"]


def timestep_ranges(workspace: Workspace, placed: Mapping[str, PlacedTensor]) -> dict[str, dict[int, Range]]:
    """For each of ``placed`` that depends on the time step, its range at every calibrated step, ascending.

    Raises:
        CalibrationError: a sample has no time step, or none has that of the threshold.
        RecipeError: statistics come from a file, which does not tell samples apart.
    """
    depending = {key: one for key, one in placed.items() if isinstance(one.while_, BelowTimestep)}
    if not depending:
        return {}
    if workspace.recorded is not None or workspace.record is not None:
        raise RecipeError(
            "act.when: timestep needs the samples themselves, which statistics do not tell apart; "
            "give quantize --calib in place of --stats"
        )
    positions = _positions(workspace)
    for one in depending.values():
        assert isinstance(one.while_, BelowTimestep)
        if one.while_.threshold not in positions:
            known = ", ".join(map(str, sorted(positions)))
            raise CalibrationError(
                f"timestep_sep: no sample has {TIMESTEP} {one.while_.threshold}, the first static one; "
                f"the samples have {known}"
            )
    probes = list(dict.fromkeys(p for one in depending.values() for p in range_probes(one)))
    running: dict[Probe, Stats] = {}
    found: dict[str, dict[int, Range]] = {key: {} for key in depending}
    for step in sorted(positions, reverse=True):
        part = replace(workspace, calibration=subset(workspace.calibration, positions[step]), memo={})
        for probe, stats in part.collect(probes).items():
            if probe in running:
                running[probe].merge(stats)
            else:
                running[probe] = stats
        for key, one in depending.items():
            found[key][step] = fixed_range(one, running)
    return {key: dict(sorted(ranges.items())) for key, ranges in found.items()}


def _positions(workspace: Workspace) -> dict[int, Sequence[int]]:
    """Where in the data the samples of each step are."""
    positions: dict[int, list[int]] = {}
    for position, (sample, _) in enumerate(workspace.calibration):
        if TIMESTEP not in sample.tags:
            raise CalibrationError(f"{sample}: has no {TIMESTEP}; add it to every sample, as an integer")
        positions.setdefault(sample.tags[TIMESTEP], []).append(position)
    return dict(positions)
