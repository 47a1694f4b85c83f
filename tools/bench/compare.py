"""The main benchmark of one model: our default settings beside `quantize_static`, every run in its own process."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .records import OURS, PEER, Row, Table
from .settings import Setting, peers_of
from .spawn import JobError, Limits, run_job
from .subset import pick, ragged

LEAST_SAMPLES = 8


class Bench:
    """Runs jobs for one model in a folder for its results; says on stderr what it does."""

    def __init__(
        self, model: str, folder: Path, limits: Limits, stamp: dict[str, str], rounds: int = 15
    ) -> None:
        self.model, self.folder, self.limits, self.rounds = model, folder, limits, rounds
        answer = self.job("float", "the float model")
        self.shapes: list[Any] = answer["shapes"]
        self.table = Table(
            model, answer["model_mb"], answer["peak_mb"], answer["forward_s"], answer["metrics"], stamp
        )
        self._files: list[tuple[Row, Path]] = []

    def job(self, do: str, what: str, **arguments: Any) -> dict[str, Any]:
        """The answer of a worker; JobError when it fails."""
        print(f"[{self.model}] {do}: {what}", file=sys.stderr, flush=True)
        return run_job({"do": do, "model": self.model, **arguments}, self.limits)

    def ours(self, recipe: str, label: str, **options: Any) -> None:
        """Add the row of our tool with a ready recipe; a result that it refuses to write is still measured."""
        row = self._ours(recipe, label, options)
        if row.error.startswith("VerificationError") and "min_sqnr" not in options:
            self.table.rows.remove(row)
            refused, row = row.error, self._ours(recipe, label, {**options, "min_sqnr": 0})
            row.refused, row.note = refused, "--min-sqnr 0, without it the tool refuses to write the result"

    def _ours(self, recipe: str, label: str, options: dict[str, Any]) -> Row:
        row, setting = Row(OURS, label), {"recipe": recipe, "options": options}
        self._run(row, [({}, "")], {"tool": "ours", "setting": setting})
        return row

    def peer(self, setting: Setting) -> None:
        """Add the row of `quantize_static`, with fewer samples when it cannot live with all of them."""
        row = Row(PEER, setting.name)
        self._run(row, self._attempts(), {"tool": "peer", "setting": asdict(setting)})

    def _attempts(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Ever smaller sample sets, each with its note: all, those of one shape, then halves of these."""
        total = len(self.shapes)
        yield {}, ""
        same = ragged(self.shapes)
        count = len(pick(self.shapes, same_shape=same))
        if same:
            yield (
                {"same_shape": True},
                f"only the {count} of {total} samples that share a shape: ragged ones fail",
            )
        while count // 2 >= LEAST_SAMPLES:
            count //= 2
            yield (
                {"same_shape": same, "limit": count},
                f"only {count} of {total} samples: more take too much memory",
            )

    def _run(
        self, row: Row, attempts: Iterator[tuple[dict[str, Any], str]] | list[Any], job: dict[str, Any]
    ) -> None:
        self.table.rows.append(row)
        out = self.folder / f"{self.model}-{len(self.table.rows)}.onnx"
        what = f"{row.tool}, {row.setting}"
        try:
            answer, note = self._quantized(attempts, what, {**job, "out": str(out)})
            row.quantize_s, row.forward_s = answer["quantize_s"], answer["forward_s"]
            row.peak_mb, row.size_ratio = answer["peak_mb"], answer["size_mb"] / self.table.model_mb
            row.note = "; ".join(part for part in (note, answer["note"]) if part)
            measured = self.job("measure", what, file=str(out))
            row.metrics, row.sqnr = measured["metrics"], measured["sqnr"]
        except JobError as error:
            row.error = str(error)
        else:
            self._files.append((row, out))

    def _quantized(self, attempts: Any, what: str, job: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The first attempt that works; after running out of memory only a smaller sample set is worth a try."""
        failed: JobError | None = None
        for arguments, note in attempts:
            if failed and "limit" in arguments and not failed.memory:
                break
            try:
                return self.job("quantize", what, **job, **arguments), note
            except JobError as error:
                failed = error
        raise failed or JobError("nothing to try")

    def latencies(self) -> None:
        """Fill in the latencies of all rows that work, each measured in turns with the float model."""
        floats = []
        for row, file in self._files:
            what = f"{row.tool}, {row.setting}"
            try:
                exact, other = self.job("latency", what, files=[str(file)], rounds=self.rounds)["ms"]
            except JobError as error:
                print(f"[{self.model}] no latency: {error}", file=sys.stderr)
                continue
            floats.append(exact)
            row.latency = other / exact
        self.table.latency_ms = statistics.median(floats) if floats else None


def compare(bench: Bench, ours_only: bool) -> Table:
    """All rows of the main section for one model."""
    bench.ours("w8a8", "default settings, file as shipped")
    for setting in () if ours_only else peers_of(bench.model):
        bench.peer(setting)
    bench.latencies()
    return bench.table


def recipes(bench: Bench, names: Sequence[str]) -> Table:
    """All rows of the ranges section for one model: a recipe that ruins the model is a figure, not a failure."""
    for name in names:
        bench.ours(name, name, min_sqnr=0)
    return bench.table


def quality(bench: Bench, names: Sequence[str]) -> Table:
    """All rows of the quality section for one model: recipes that trade time against accuracy, with latencies."""
    for name in names:
        bench.ours(name, name, min_sqnr=0)
    bench.latencies()
    return bench.table


def outliers(model: str, limits: Limits, stamp: dict[str, str]) -> Table:
    """Recipes on a model as it is and with outlier channels; `metrics` of a row hold both SQNR."""
    print(f"[{model}] outliers", file=sys.stderr, flush=True)
    found = run_job({"do": "outliers", "model": model}, limits)["sqnr"]
    rows = [
        Row(OURS, name, metrics={"untouched": untouched, "outliers": altered})
        for name, (untouched, altered) in found.items()
    ]
    return Table(model, 0.0, 0.0, 0.0, {}, stamp, rows=rows)
