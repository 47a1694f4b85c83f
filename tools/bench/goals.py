"""What the tool promises, as a table, and whether a run keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .records import PEER, Row, Table

LATENCY_MARGIN, SQNR_MARGIN = 1.05, 1.0


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of our row: `sqnr`, `latency` or a task metric, absolute or relative to the float model."""

    model: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    from_float: bool = False


GOALS = (
    Goal("rec", "line_accuracy", at_least=-0.03, from_float=True),
    Goal("rec", "cer", at_most=0.006, from_float=True),
    Goal("rec", "sqnr", at_least=12.5),
    Goal("rec", "latency", at_most=0.9),
    Goal("cls", "accuracy", at_least=-0.005, from_float=True),
    Goal("cls", "sqnr", at_least=29),
    Goal("det", "hmean", at_least=-0.005, from_float=True),
    Goal("det", "sqnr", at_least=17),
    Goal("det", "latency", at_most=0.9),
    Goal("effnet", "sqnr", at_least=19),
    Goal("minilm", "sqnr", at_least=16.5),
    Goal("minilm", "latency", at_most=0.4),
)


@dataclass(frozen=True)
class Verdict:
    """One line of the acceptance table; `kept` is None when a figure is missing."""

    model: str
    goal: str
    bound: str
    measured: str
    kept: bool | None


def judge(table: Table) -> list[Verdict]:
    """Every goal that concerns this model: the general ones (`_GENERAL`), then its own of `GOALS`."""
    row = table.ours
    if row is None or row.error:
        why = row.error if row else "not run"
        return [Verdict(table.model, "quantizes and runs", "", why, False if row else None)]
    verdicts = [general(table, row) for general in _GENERAL]
    if row.refused:
        verdicts.insert(0, Verdict(table.model, "default settings write a result", "", row.refused, False))
    return verdicts + [_own(goal, table, row) for goal in GOALS if goal.model == table.model]


def _time(table: Table, row: Row) -> Verdict:
    name = "quantize time ≤ 3 × forward + 2 s"
    if row.quantize_s is None or row.forward_s is None:
        return Verdict(table.model, name, "", "not measured", None)
    bound = 3 * row.forward_s + 2
    return Verdict(table.model, name, f"{bound:.1f} s", f"{row.quantize_s:.1f} s", row.quantize_s <= bound)


def _memory(table: Table, row: Row) -> Verdict:
    name = "peak memory ≤ plain + 1.5 × model + 150 MB"
    if row.peak_mb is None:
        return Verdict(table.model, name, "", "not measured", None)
    kept = row.peak_mb <= table.bound_mb
    return Verdict(table.model, name, f"{table.bound_mb:.0f} MB", f"{row.peak_mb:.0f} MB", kept)


def _speed(table: Table, row: Row) -> Verdict:
    name = f"latency ≤ {LATENCY_MARGIN} × the fastest {PEER} result with our SQNR − {SQNR_MARGIN:g} dB"
    if row.latency is None or row.sqnr is None:
        return Verdict(table.model, name, "", "not measured", None)
    peers = [peer for peer in table.rows if peer.tool == PEER]
    if not peers:
        return Verdict(table.model, name, f"{PEER} not run", f"{row.latency:.2f}", None)
    least = row.sqnr - SQNR_MARGIN
    rivals = [p.latency for p in peers if p.latency is not None and p.sqnr is not None and p.sqnr >= least]
    if not rivals:
        return Verdict(table.model, name, "none reaches it", f"{row.latency:.2f}", True)
    bound = LATENCY_MARGIN * min(rivals)
    return Verdict(table.model, name, f"{bound:.2f}", f"{row.latency:.2f}", row.latency <= bound)


_GENERAL: tuple[Callable[[Table, Row], Verdict], ...] = (_time, _memory, _speed)


def _own(goal: Goal, table: Table, row: Row) -> Verdict:
    figures = {"sqnr": row.sqnr, "latency": row.latency, **row.metrics}
    value, start = figures.get(goal.figure), table.metrics.get(goal.figure, 0.0) if goal.from_float else 0.0
    limit, sense = (goal.at_least, "≥") if goal.at_least is not None else (goal.at_most, "≤")
    assert limit is not None
    digits = 1 if goal.figure == "sqnr" else 2 if goal.figure == "latency" else 4
    bound = start + limit
    relative = f"float {limit:+g}".replace("-", "−") if goal.from_float else f"{limit:g}"
    name = f"{title(goal.figure)} {sense} {relative}"
    if value is None:
        return Verdict(table.model, name, f"{bound:.{digits}f}", "not measured", None)
    slack = 1e-9  # a share of 400 images is no exact binary number
    kept = value >= bound - slack if sense == "≥" else value <= bound + slack
    return Verdict(table.model, name, f"{bound:.{digits}f}", f"{value:.{digits}f}", kept)


def title(figure: str) -> str:
    """How a figure is called in tables."""
    known = {"sqnr": "SQNR (dB)", "cer": "CER", "top1": "top-1", "top5": "top-5"}
    return known.get(figure, figure.replace("_", " "))
