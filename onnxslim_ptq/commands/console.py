"""What people and programs see: text and JSON on stdout, warnings and progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calib.progress import Progress

__all__ = [
    "Bars",
    "columns",
    "db",
    "emit_json",
    "note",
    "one_line",
    "plain",
    "program",
    "say",
    "size",
    "warn",
]

_NOT_SET = "n/a"


def program() -> str:
    """The command as the user typed it: the installed script may not be on the path."""
    path = Path(sys.argv[0])
    started_as_module = path.name == "__main__.py" and path.parent.name == "onnxslim_ptq"
    return "python -m onnxslim_ptq" if started_as_module else "onnxslim-ptq"


def plain(text: object) -> str:
    """The text without control characters, which a name from a model could use to steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in str(text))


def one_line(text: object) -> str:
    return plain(" ".join(str(text).split()))


def say(text: str = "") -> None:
    """A line of the answer, on stdout."""
    sys.stdout.write(plain(text) + "\n")


def note(text: str) -> None:
    """A line for a person, on stderr."""
    sys.stdout.flush()
    sys.stderr.write(plain(text) + "\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    note(f"warning: {one_line(text)}")


def emit_json(value: Any) -> None:
    """One strict JSON document on stdout: NaN and infinities become null."""
    sys.stdout.write(json.dumps(_strict(value), indent=2, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_strict(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def size(nbytes: int) -> str:
    """Bytes for a person: three digits and a unit."""
    number, units = float(nbytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    if units[0] == "bytes":
        return f"{nbytes} bytes"
    return f"{number:.3g} {units[0]}" if number < 1000 else f"{number:.0f} {units[0]}"


def db(value: float | None) -> str:
    """An SQNR for a person."""
    if value is None:
        return _NOT_SET
    return f"{value:.1f} dB" if math.isfinite(value) else ("exact" if value > 0 else "-inf dB")


def columns(
    rows: Iterable[Iterable[object]], *, right: frozenset[int] = frozenset(), indent: str = "  "
) -> list[str]:
    """Lines with aligned columns; those in ``right`` are aligned to the right."""
    cells = [[one_line(c) for c in row] for row in rows]
    if not cells:
        return []
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        (
            indent
            + "  ".join(
                c.rjust(w) if i in right else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in cells
    ]


class Bars:
    """A listener that draws progress bars on stderr; silent when stderr is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._what = ""
        self._shown = sys.stderr.isatty() and not quiet

    def __enter__(self) -> Bars:
        if self._shown:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress

            self._progress = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("preparing", total=None, rate="")
        return self

    def __call__(self, event: Progress) -> None:
        if self._progress is None:
            return
        if event.what != self._what:
            self._what = event.what
            self._progress.reset(self._task)
        finished = event.done >= event.total
        self._progress.update(
            self._task,
            description=event.what,
            completed=event.done,
            total=event.total,
            rate=self._rate(event),
        )
        if finished:  # what comes next (choosing ranges, writing) has no length that is known
            self._what = ""
            self._progress.reset(self._task, total=None, description="computing", rate="")

    def _rate(self, event: Progress) -> str:
        rate = event.rate or next(t.speed for t in self._progress.tasks if t.id == self._task)
        return f"{rate:.1f}/s" if rate else ""

    def __exit__(self, *raised: object) -> None:
        if self._progress is not None:
            self._progress.stop()
