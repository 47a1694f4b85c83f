"""Markdown: tables, sections, and a file whose sections are refreshed one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .goals import Verdict, judge, title
from .records import OURS, Row, Table

TITLE = """# Benchmarks

Written by `python -m tools.bench`; do not edit by hand.
The cost of calibration sweeps has a page of its own: [benchmarks-calib.md](benchmarks-calib.md).
"""
OUTLIER_BOUNDS = {"smoothquant": 0.5, "m4": 0.5, "m6": 1.0, "transformer": 0.5}
SECTIONS = ("main", "ranges", "quality", "outliers", "blockwise")

_MAIN = """## Against `onnxruntime.quantization.quantize_static`

W8A8 from the same 64 calibration samples, on the CPU. Every run has its own process.

- `quantize s`: from the file as shipped to the written result. `× forward`: that, over a plain float pass over the
  same samples in the same process (three samples of warm-up; making the session does not count).
- `peak MB`: resident memory of the process, the samples (already in memory) included; `ok` or `over` compares it with
  the bound, plain float inference + 1.5 × model + 150 MB.
- `size`: of the file, over the float file's. `SQNR dB`: worst float output over all evaluation samples,
  10 log10(Σ y² / Σ (y − ŷ)²).
- `latency`: over the float model's; medians of rounds in which the two take turns in a process of their own, 2
  threads, one sample.

`quantize_static` gets its best settings: constants lifted, opset 13 or newer, `quant_pre_process`, `per_channel`,
uint8 activations, int8 weights (symbolic shape inference where sympy is installed and copes with the model). One row
shows its defaults on the file as shipped. Where it cannot take all samples,
the row says with which ones it worked.
"""
_RANGES = """## Ready recipes

What each way of finding activation ranges does to the same models; all else is as in the default, `w8a8`. SQNR,
metrics and time as in the comparison with `quantize_static`.
"""

_QUALITY = """## Quality

Smoothing, rounding and other forms: recipes beside the default, `w8a8`, from the same 64 calibration samples, with
every recipe's result written whatever its SQNR (`--min-sqnr 0`).

- `latency`: over the float model's, as above; `× w8a8`: over the default's.
- `× float`: the perplexity over the float model's. `Δnll`: what the mean negative log-likelihood of a token grew by, ±
  its standard error over the pairs of tokens, s / √n.
- `seconds`: from the file as shipped to the written result.
"""
_OUTLIERS = """## Models with outlier channels

1 % of the channels at each norm (at least one) are multiplied by 100 and the weights that read them divided by 100: the
same float function. SQNR in dB of the worst output on evaluation samples. `plain` is `w8a8` without smoothing;
`llama-block` one random decoder block (opset 17, grouped queries, rotary embedding). A recipe keeps its goal when
outliers cost it at most 0.5 dB (`m6`: 1 dB) and it stays at least 6 dB above `plain`.
"""


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are right-aligned. Bars in cells are escaped."""
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    lines = [[_cell(cell) for cell in line] for line in (headings, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def number(value: float | None, digits: int) -> str:
    """The value with so many digits, a dash when there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def section(name: str, tables: Mapping[str, Table]) -> str:
    """The text of a section."""
    one, intro = {
        "main": (main_table, _MAIN),
        "ranges": (ranges_table, _RANGES),
        "quality": (quality_table, _QUALITY),
        "outliers": (outliers_table, _OUTLIERS),
    }[name]
    parts = [intro, *stamps(tables.values())]
    parts += [f"### {table.model}\n\n{one(table)}" for table in tables.values()]
    if name == "main":
        parts.append("### Goals\n\n" + goals_table([v for table in tables.values() for v in judge(table)]))
    return "\n".join(parts)


def stamps(tables: Iterable[Table]) -> list[str]:
    """Where the figures come from; once when all models were measured together, otherwise per run."""
    runs: dict[str, list[str]] = {}
    for table in tables:
        stamp = table.stamp
        text = f"{stamp['date']}, `{stamp['command']}`  \n{stamp['machine']}  \n{stamp['versions']}\n"
        runs.setdefault(text, []).append(table.model)
    return [f"{', '.join(models)}: {text}" if len(runs) > 1 else text for text, models in runs.items()]


def main_table(table: Table) -> str:
    """The float model's figures, then all rows."""
    metrics = list(table.metrics)
    float_text = ", ".join(f"{title(m)} {table.metrics[m]:.4f}" for m in metrics)
    latency = f", {table.latency_ms:.2f} ms a call" if table.latency_ms is not None else ""
    intro = (
        f"Float: {float_text}; {table.model_mb:.1f} MB, forward pass {table.forward_s:.2f} s{latency}, "
        f"peak {table.plain_mb:.0f} MB; memory bound {table.bound_mb:.0f} MB.\n"
    )
    headings = ["tool, setting", "quantize s", "× forward", "peak MB", "size", *map(title, metrics)]
    headings += ["SQNR dB", "latency"]
    rows = [_main_row(table, row, metrics) for row in table.rows]
    return f"{intro}\n{markdown(headings, rows)}"


def _main_row(table: Table, row: Row, metrics: Sequence[str]) -> list[str]:
    over = row.quantize_s / row.forward_s if row.quantize_s and row.forward_s else None
    peak = "–"
    if row.peak_mb is not None:
        peak = f"{row.peak_mb:.0f} {'ok' if row.peak_mb <= table.bound_mb else 'over'}"
    return [
        _name(row, f"{row.tool}: {row.setting}"),
        number(row.quantize_s, 1),
        number(over, 1),
        peak,
        number(row.size_ratio, 2),
        *(number(row.metrics.get(metric), 4) for metric in metrics),
        number(row.sqnr, 1),
        number(row.latency, 2),
    ]


def _name(row: Row, name: str) -> str:
    shown = f"**{name}**" if row.tool == OURS else name
    return shown + (f" ({row.note})" if row.note else "") + (f" **failed:** {row.error}" if row.error else "")


def ranges_table(table: Table) -> str:
    """Recipes by SQNR, task metrics and time."""
    metrics = list(table.metrics)
    headings = [
        "recipe",
        "SQNR dB",
        *(f"{title(m)} (float {table.metrics[m]:.4f})" for m in metrics),
        "quantize s",
    ]
    rows = [
        [
            f"`{row.setting}`" + (f" **failed:** {row.error}" if row.error else ""),
            number(row.sqnr, 1),
            *(number(row.metrics.get(metric), 4) for metric in metrics),
            number(row.quantize_s, 1),
        ]
        for row in table.rows
    ]
    return markdown(headings, rows)


def quality_table(table: Table) -> str:
    """Recipes by SQNR, task metrics, growth of the loss, size, latency and time."""
    metrics = list(table.metrics)
    losses = any("loss_growth" in row.metrics for row in table.rows)
    titles = [f"{title(m)} (float {table.metrics[m]:.4f})" for m in metrics]
    headings = ["recipe", "SQNR dB", *titles, *(("× float", "Δnll") if losses else ())]
    headings += ["size", "latency", "× w8a8", "peak MB", "seconds"]
    first = next((row.latency for row in table.rows if row.setting == "w8a8"), None)
    rows = [
        [
            f"`{row.setting}`" + (f" **failed:** {row.error}" if row.error else ""),
            number(row.sqnr, 1),
            *(number(row.metrics.get(metric), 4) for metric in metrics),
            *(_growth(row) if losses else ()),
            number(row.size_ratio, 2),
            number(row.latency, 2),
            number(row.latency / first if row.latency and first else None, 2),
            number(row.peak_mb, 0),
            number(row.quantize_s, 1),
        ]
        for row in table.rows
    ]
    return markdown(headings, rows)


def _growth(row: Row) -> tuple[str, str]:
    """exp(Δnll), and Δnll with its standard error."""
    if "loss_growth" not in row.metrics:
        return "–", "–"
    growth, error = row.metrics["loss_growth"], row.metrics["loss_growth_error"]
    return f"{math.exp(growth):.4f}", f"{growth:.4f} ± {error:.4f}"


def outliers_table(table: Table) -> str:
    """Recipes by their SQNR with and without outliers, and what is asked of them."""
    plain = next((row.metrics["outliers"] for row in table.rows if row.setting == "plain"), None)
    rows = []
    for row in table.rows:
        untouched, altered = row.metrics["untouched"], row.metrics["outliers"]
        above = None if plain is None or row.setting == "plain" else altered - plain
        bound = OUTLIER_BOUNDS.get(row.setting)
        kept = bound is not None and untouched - altered <= bound and above is not None and above >= 6
        word = "–" if bound is None else "ok" if kept else "**missed**"
        rows.append(
            [
                f"`{row.setting}`",
                *(number(v, 1) for v in (untouched, altered, untouched - altered, above)),
                word,
            ]
        )
    return markdown(["recipe", "untouched", "with outliers", "lost", "above plain", "goal"], rows)


def goals_table(verdicts: Sequence[Verdict]) -> str:
    """Goals with their bounds, and how many are kept."""
    word = {True: "ok", False: "**missed**", None: "–"}
    rows = [[v.model, v.goal, v.bound, v.measured, word[v.kept]] for v in verdicts]
    kept, judged = (sum(v.kept in wanted for v in verdicts) for wanted in ((True,), (True, False)))
    return f"{kept} of {judged} kept.\n\n" + markdown(["model", "goal", "bound", "measured", ""], rows)


def replace_section(text: str, name: str, body: str, order: Sequence[str] = SECTIONS) -> str:
    """`text` with the section `name` between its markers replaced, or added where ``order`` has it."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    block = f"{begin}\n{body.strip()}\n{end}"
    if begin in text and end in text:
        before, _, rest = text.partition(begin)
        return before + block + rest.partition(end)[2]
    later = [f"<!-- bench:{other} -->" for other in order[order.index(name) + 1 :]]
    places = [text.index(marker) for marker in later if marker in text]
    place = min(places, default=len(text))
    return f"{text[:place].rstrip()}\n\n{block}\n" + (f"\n{text[place:]}" if places else "")


def refresh(path: Path, name: str, body: str, head: str = TITLE, order: Sequence[str] = SECTIONS) -> None:
    """Write one section into the file, which is made when missing, with ``head`` at its top."""
    text = path.read_text("utf-8") if path.exists() else head
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(replace_section(text, name, body, order), "utf-8")
