"""How far a sweep has come, on disk: a killed run goes on at the last finished block of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pydantic import Field

from calib.errors import CalibrationError
from calib.readers.limits import DEFAULT_LIMITS
from calib.saved.container import Header, read_container, write_container
from calib.saved.identity import Conditions
from calib.saved.store import Sweep, revived, states_of, sweep_of
from calib.types import Probe, Stats

__all__ = ["Block", "Resume", "SweepKey", "SweepProgress"]

FORMAT, VERSION = "calib.saved.progress", 1
_SUFFIX = ".sweep"


@dataclass(frozen=True)
class Resume:
    """Where progress is kept and how often it is written (seconds; longer where writing takes long).

    ``model`` and ``data`` are the hash of the model as given and the fingerprint of the samples, when known. One run
    at a time may use a folder.
    """

    folder: Path
    model: str = ""
    data: str = ""
    every: float = 30.0

    def clear(self) -> None:
        """Remove the progress, after success; the folder too when nothing else is in it."""
        for path in self.folder.glob(f"*{_SUFFIX}"):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


class SweepKey(Header):
    """What a sweep depends on: progress serves exactly the sweep it was made by."""

    model: str
    graph: str
    data: str
    conditions: Conditions

    def differences(self, other: SweepKey) -> list[str]:
        """Which parts differ, in words."""
        mine, theirs = self.conditions.model_dump(), other.conditions.model_dump()
        found = [name for name in ("model", "data") if getattr(self, name) != getattr(other, name)]
        return found + [
            f"{name} ({theirs[name]}, now {mine[name]})" for name in mine if mine[name] != theirs[name]
        ]


class Block(Header):
    """Positions ``first`` to ``last`` of the data, both finished."""

    first: int = Field(ge=0)
    last: int = Field(ge=0, le=DEFAULT_LIMITS.max_samples)


class _File(Header):
    key: SweepKey
    blocks: tuple[Block, ...]
    sweep: Sweep


class SweepProgress:
    """The statistics of the finished samples of one sweep, and which those are."""

    def __init__(self, resume: Resume, key: SweepKey, probes: Sequence[Probe]) -> None:
        """Take up what the folder holds of this sweep.

        Raises:
            CalibrationError: the folder holds the progress of another run, or cannot be used.
        """
        self._key, self._probes = key, list(probes)
        text = key.model_dump_json() + repr(sorted(map(repr, probes)))
        self._path = resume.folder / f"{sha256(text.encode()).hexdigest()[:24]}{_SUFFIX}"
        self.stats: dict[Probe, Stats] = {}
        self.done: set[int] = set()
        try:
            resume.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CalibrationError(
                f"--resume {resume.folder}: cannot be made ({error.strerror}); choose another folder"
            ) from None
        if self._path.is_file():
            self._read()
        else:
            _require_same_run(resume.folder, key)

    def _read(self) -> None:
        file, arrays = read_container(self._path, FORMAT, VERSION, _File)
        states = states_of(file.sweep, arrays)
        if file.key != self._key or set(states) != set(self._probes):
            raise CalibrationError(f"'{self._path}' is of another sweep; remove it and run again")
        self.stats = {probe: revived(probe, states[probe]) for probe in self._probes}
        self.done = {p for block in file.blocks for p in range(block.first, block.last + 1)}

    def add(self, positions: Sequence[int], stats: Mapping[Probe, Stats]) -> None:
        """Merge the statistics of some more samples."""
        self.done.update(positions)
        for probe in self._probes:
            if probe in self.stats:
                self.stats[probe].merge(stats[probe])
            else:
                self.stats[probe] = stats[probe]

    def save(self) -> None:
        """Write what is known to the folder, all or nothing."""
        sweep, arrays = sweep_of(self._key.graph, {p: s.state() for p, s in self.stats.items()})
        header = _File(key=self._key, blocks=tuple(_blocks(self.done)), sweep=sweep)
        write_container(self._path, FORMAT, VERSION, header, arrays)


def _require_same_run(folder: Path, key: SweepKey) -> None:
    """A finished earlier sweep of the same run may lie there; the progress of another run must not be overlooked."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        found = read_container(path, FORMAT, VERSION, _File)[0].key
        if differing := key.differences(found):
            raise CalibrationError(
                f"--resume {folder}: holds the progress of another run, which differs in {', '.join(differing)}; "
                "give the options of that run, or remove the folder"
            )


def _blocks(positions: set[int]) -> list[Block]:
    blocks: list[Block] = []
    start: int | None = None
    before = -2
    for position in sorted(positions):
        if position != before + 1:
            if start is not None:
                blocks.append(Block(first=start, last=before))
            start = position
        before = position
    return blocks if start is None else [*blocks, Block(first=start, last=before)]
