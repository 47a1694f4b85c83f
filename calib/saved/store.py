"""Statistics on disk: whose they are (model, data, options), what they are, and the few samples kept with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from calib.errors import CalibrationError
from calib.model import Model
from calib.saved.container import Header, read_container, write_container
from calib.saved.identity import Conditions, ModelRef, Shard
from calib.saved.kept import Kept, KeptRows
from calib.stats import COLLECTORS
from calib.types import Array, Probe, Stats

__all__ = ["State", "Statistics", "Sweep", "revived", "states_of", "sweep_of"]

FORMAT, VERSION = "calib.statistics", 1
_POSITIONS = ("index", "bad_index")  # arrays of a state that hold sample numbers (-1: none)
_SHORT = 12


class ProbeRow(Header):
    """A `Probe`."""

    tensor: str
    kind: str
    axis: int | None
    options: tuple[tuple[str, float], ...]


class Sweep(Header):
    """The probes that were served on one float graph, which is known by its hash."""

    graph: str
    probes: tuple[ProbeRow, ...]


class _File(Header):
    model: ModelRef
    data: tuple[Shard, ...] = Field(min_length=1)
    conditions: Conditions
    sweeps: tuple[Sweep, ...]
    kept: KeptRows
    prepared: tuple[str, ...]
    made_with: dict[str, Any]


State = Mapping[str, Array]


def sweep_of(graph: str, states: Mapping[Probe, State], number: int = 0) -> tuple[Sweep, dict[str, Array]]:
    """The header and the arrays of one sweep, named ``<number>.<probe>.<array>``."""
    rows = [ProbeRow(tensor=p.tensor, kind=p.kind, axis=p.axis, options=p.options) for p in states]
    arrays = {
        f"{number}.{i}.{name}": array
        for i, state in enumerate(states.values())
        for name, array in state.items()
    }
    return Sweep(graph=graph, probes=tuple(rows)), arrays


def states_of(sweep: Sweep, arrays: Mapping[str, Array], number: int = 0) -> dict[Probe, State]:
    """The inverse of `sweep_of`; CalibrationError for a statistic this version does not have."""
    found: dict[Probe, dict[str, Array]] = {}
    for row in sweep.probes:
        if row.kind not in COLLECTORS:
            raise CalibrationError(
                f"statistic '{row.kind}' of tensor '{row.tensor}' is unknown to this version; "
                f"it knows {', '.join(COLLECTORS)}"
            )
        found[Probe(row.tensor, row.kind, row.axis, row.options)] = {}
    states = list(found.values())
    for name, array in arrays.items():
        sweep_number, _, rest = name.partition(".")
        place, _, own = rest.partition(".")
        if sweep_number == str(number) and place.isdecimal() and int(place) < len(states):
            states[int(place)][own] = array
    return dict(found)


def revived(probe: Probe, state: State) -> Stats:
    """The statistic that had ``state``; CalibrationError when the state cannot be one."""
    try:
        stats = COLLECTORS[probe.kind].from_state(state)
        again = stats.state()
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise CalibrationError(
            f"statistic '{probe.kind}' of tensor '{probe.tensor}' cannot be read ({error}); make the file again"
        ) from None
    wrong = [name for name in state if name not in again or again[name].shape != state[name].shape]
    if wrong:
        raise CalibrationError(
            f"statistic '{probe.kind}' of tensor '{probe.tensor}' has no array '{wrong[0]}' of that shape; "
            "make the file again"
        )
    return stats


@dataclass
class Statistics:
    """What ``calibrate`` gathers and ``quantize --stats`` uses: states by float graph and probe.

    ``prepared`` says in words how files became inputs, ``made_with`` is what the caller wants to remember.
    """

    model: ModelRef
    data: tuple[Shard, ...]
    conditions: Conditions
    kept: Kept = field(default_factory=Kept)
    prepared: tuple[str, ...] = ()
    made_with: dict[str, Any] = field(default_factory=dict)
    sweeps: dict[str, dict[Probe, State]] = field(default_factory=dict)
    origin: str = "the statistics"

    @property
    def samples(self) -> int:
        """How many samples were seen."""
        return sum(shard.samples for shard in self.data)

    @property
    def data_sha256(self) -> str:
        """The fingerprint of the samples; of several shards, the hash of their fingerprints in order."""
        if len(self.data) == 1:
            return self.data[0].sha256
        return sha256("".join(shard.sha256 for shard in self.data).encode()).hexdigest()

    def add(self, graph: str, stats: Mapping[Probe, Stats]) -> None:
        """Record what was gathered on the float graph with hash ``graph``."""
        self.sweeps.setdefault(graph, {}).update({probe: stat.state() for probe, stat in stats.items()})

    def find(self, graph: str, probes: Iterable[Probe]) -> dict[Probe, Stats]:
        """The statistics of ``probes`` on that graph; CalibrationError naming the first that is not here."""
        if graph not in self.sweeps:
            raise CalibrationError(
                f"{self.origin} hold nothing of the float graph that this recipe makes of the model (its hash "
                f"{graph[:_SHORT]}…); run calibrate with the recipe, target and options that quantize gets"
            )
        known = self.sweeps[graph]
        missing = [probe for probe in probes if probe not in known]
        if missing:
            raise CalibrationError(
                f"{self.origin} hold no '{missing[0].kind}' of tensor '{missing[0].tensor}'; "
                "run calibrate with the recipe, target and options that quantize gets"
            )
        return {probe: revived(probe, known[probe]) for probe in probes}

    def require(self, model: Model) -> None:
        """CalibrationError unless they were gathered from that model."""
        if model.sha256 != self.model.sha256:
            raise CalibrationError(
                f"{self.origin} are of another model: '{self.model.file}' with sha256 "
                f"{self.model.sha256[:_SHORT]}…, not {model.name} with {model.sha256[:_SHORT]}…; "
                "give that model, or calibrate this one"
            )

    def require_data(self, found: Shard) -> None:
        """CalibrationError unless they were gathered from those samples."""
        if len(self.data) > 1:
            raise CalibrationError(
                f"{self.origin} are merged from {len(self.data)} parts, so no samples can be compared with them; leave "
                "--calib out"
            )
        if self.data[0].sha256 != found.sha256:
            raise CalibrationError(
                f"{self.origin} are of other data: {self.samples} samples with sha256 "
                f"{self.data_sha256[:_SHORT]}…, not the {found.samples} with {found.sha256[:_SHORT]}…; "
                "give the samples they were gathered from, or calibrate again"
            )

    def save(self, path: Path) -> None:
        """Write one safetensors file with a JSON header, all or nothing; CalibrationError when the disk refuses."""
        rows, arrays = self.kept.rows()
        sweeps = []
        for number, (graph, states) in enumerate(self.sweeps.items()):
            sweep, own = sweep_of(graph, states, number)
            sweeps.append(sweep)
            arrays |= own
        header = _File(
            model=self.model,
            data=self.data,
            conditions=self.conditions,
            sweeps=tuple(sweeps),
            kept=rows,
            prepared=self.prepared,
            made_with=self.made_with,
        )
        write_container(path, FORMAT, VERSION, header, arrays)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            CalibrationError: see `calib.saved.container.read_container`; or a statistic is unknown to this version.
        """
        file, arrays = read_container(path, FORMAT, VERSION, _File)
        try:
            kept = file.kept.samples(arrays)
        except KeyError as error:
            raise CalibrationError(f"'{path}' lacks a kept sample ({error}); make it again") from None
        sweeps = {s.graph: states_of(s, arrays, i) for i, s in enumerate(file.sweeps)}
        origin = f"the statistics in '{path}'"
        return cls(
            file.model, file.data, file.conditions, kept, file.prepared, file.made_with, sweeps, origin
        )

    def merged(self, other: Statistics) -> Statistics:
        """Both together, the samples of ``other`` numbered after those of this one.

        Raises:
            CalibrationError: models, conditions or statistics differ, or both hold the same samples.
        """
        _require_same(self, other)
        offset = sum(shard.numbers for shard in self.data)
        sweeps: dict[str, dict[Probe, State]] = {}
        for graph, states in self.sweeps.items():
            sweeps[graph] = {}
            for probe, state in states.items():
                whole = revived(probe, state)
                whole.merge(revived(probe, _renumbered(other.sweeps[graph][probe], offset)))
                sweeps[graph][probe] = whole.state()
        kept = self.kept.merged(other.kept, offset)
        prepared = tuple(dict.fromkeys(self.prepared + other.prepared))
        return replace(self, data=self.data + other.data, kept=kept, prepared=prepared, sweeps=sweeps)


def _require_same(a: Statistics, b: Statistics) -> None:
    pair = f"{a.origin} and {b.origin}"
    if a.model.sha256 != b.model.sha256:
        raise CalibrationError(
            f"{pair} are of different models ('{a.model.file}' {a.model.sha256[:_SHORT]}…, '{b.model.file}' "
            f"{b.model.sha256[:_SHORT]}…); only parts of the data of one model can be merged"
        )
    for name, mine in a.conditions.model_dump().items():
        theirs = getattr(b.conditions, name)
        if mine != theirs:
            raise CalibrationError(
                f"{pair} were gathered with different {name} ({mine}, {theirs}); gather one of them again"
            )
    if {shard.sha256 for shard in a.data} & {shard.sha256 for shard in b.data}:
        raise CalibrationError(
            f"{pair} hold the same samples; merge statistics of different parts of the data"
        )
    probes = [{(graph, p) for graph, states in s.sweeps.items() for p in states} for s in (a, b)]
    if odd := probes[0] ^ probes[1]:
        graph, probe = min(odd, key=repr)
        where = a if (graph, probe) in probes[0] else b
        raise CalibrationError(
            f"only {where.origin} hold '{probe.kind}' of tensor '{probe.tensor}' (graph {graph[:_SHORT]}…); gather "
            "both with the same recipe; a recipe that changes the float graph by its statistics cannot be merged"
        )


def _renumbered(state: State, offset: int) -> State:
    """The state with every sample number raised by ``offset``."""
    return {
        name: np.where(array >= 0, array + offset, array).astype(array.dtype)  # type: ignore[operator]
        if name.rpartition(".")[2] in _POSITIONS
        else array
        for name, array in state.items()
    }
