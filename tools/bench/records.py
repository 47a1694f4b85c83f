"""The measurements as data, and the JSON file that keeps them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OURS = "onnxslim_ptq"
PEER = "quantize_static"


@dataclass
class Row:
    """One tool with one setting on one model; what failed or was not measured is None."""

    tool: str
    setting: str
    quantize_s: float | None = None
    forward_s: float | None = None
    peak_mb: float | None = None
    size_ratio: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    sqnr: float | None = None
    latency: float | None = None
    note: str = ""
    error: str = ""
    refused: str = ""  # why the tool would not write this result without being told to


@dataclass
class Table:
    """One model: the float model's own figures, one row per setting, and where and when they were measured."""

    model: str
    model_mb: float
    plain_mb: float
    forward_s: float
    metrics: dict[str, float]
    stamp: dict[str, str]
    latency_ms: float | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def ours(self) -> Row | None:
        """The row of our default settings."""
        return next((row for row in self.rows if row.tool == OURS), None)

    @property
    def bound_mb(self) -> float:
        """The peak memory that quantizing may take: plain inference + 1.5 x model + 150 MB."""
        return self.plain_mb + 1.5 * self.model_mb + 150


Results = dict[str, dict[str, Table]]  # section -> model -> table


def read_results(path: Path | None) -> Results:
    """What an earlier run left in the file; nothing when there is none."""
    if path is None or not path.exists():
        return {}
    held: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text("utf-8"))
    return {
        section: {name: _table(data) for name, data in tables.items()} for section, tables in held.items()
    }


def _table(data: dict[str, Any]) -> Table:
    return Table(**{**data, "rows": [Row(**row) for row in data["rows"]]})


def write_results(path: Path | None, results: Results) -> None:
    """Write everything measured so far; called after every model, so that an interrupted run keeps its work."""
    if path is None:
        return
    held = {
        section: {name: asdict(table) for name, table in tables.items()}
        for section, tables in results.items()
    }
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(held, indent=1) + "\n", "utf-8")
    temporary.replace(path)
