"""The pages of the documentation as data: their code blocks, tables, example commands, and the options there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer

from onnxslim_ptq.cli import app

__all__ = [
    "COMMAND_PAGES",
    "FENCE",
    "OPTION",
    "PAGES",
    "ROOT",
    "WRITTEN",
    "arguments_of",
    "blocks",
    "examples",
    "only_blocks",
    "options",
    "page_name",
    "page_text",
    "same_words",
    "shapes",
    "table",
]

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND_PAGES = [page for page in PAGES if page.parent.name == "commands"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
_PROGRAM = re.compile(r"^\$ (?:python -m onnxslim_ptq|onnxslim-ptq) (?P<arguments>.*)$")
WRITTEN = [
    page
    for page in PAGES
    if page.name not in ("benchmarks.md", "benchmarks-calib.md", "benchmarks-session.md")
]  # the others are generated, by another program


def page_name(page: Path) -> str:
    """The path from the repository's root."""
    return page.relative_to(ROOT).as_posix()


def page_text(name: str) -> str:
    """The text of the page with that path."""
    return (ROOT / name).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The bodies of the code blocks in that language."""
    return [body for kind, body in FENCE.findall(text) if kind == language]


def only_blocks(text: str, language: str) -> str:
    """The blocks of that language, every other line empty: errors then show the lines of the document."""
    kept, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == f"```{language}"
            line = ""
        kept.append(line if inside else "")
    return "\n".join(kept)


def table(text: str, header: str) -> list[list[str]]:
    """The rows, as stripped cells, of the table whose first line starts with ``header``."""
    lines = iter(text.splitlines())
    assert any(line.startswith(header) for line in lines), f"no table starts with {header!r}"
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def arguments_of(line: str) -> list[str] | None:
    """The arguments of a line of a console block that runs this program."""
    found = _PROGRAM.match(line)
    return shlex.split(found["arguments"], comments=True) if found else None


def examples(page: Path) -> list[list[str]]:
    """The arguments of a page's example commands."""
    lines = [line for block in blocks(page.read_text("utf-8"), "console") for line in block.splitlines()]
    return [arguments for line in lines if (arguments := arguments_of(line)) is not None]


def options() -> dict[str, dict[str, bool]]:
    """Per command, each long option and whether ``--help`` hides it."""
    root: Any = typer.main.get_command(app)
    found = {
        name: {
            option: bool(p.hidden)
            for p in command.params
            for option in p.opts
            if p.param_type_name == "option"
        }
        for name, command in root.commands.items()
    }
    return {**found, "": {option: False for p in root.params for option in p.opts}}


def _shape(line: str) -> str:
    """The line with what differs between machines taken out: numbers, and which node it is about."""
    line = re.sub(r"(?<![\w.-])/[\w./]+", "/N", line)
    return " ".join(re.sub(r"-?\d[\d,.]*(?:e[-+]?\d+)?", "#", line).split())


def shapes(text: str) -> list[str]:
    """The lines that hold something, without numbers, names of nodes and widths of columns."""
    return [shape for line in text.splitlines() if (shape := _shape(line))]


def same_words(shown: list[str], printed: str) -> str | None:
    """The first line of ``shown`` that ``printed`` lacks, in order; "…" stands for anything."""
    rest = iter(shapes(printed))
    for line in filter(None, map(_shape, shown)):
        form = re.compile(".*".join(map(re.escape, line.split("…"))))
        if not any(form.fullmatch(found) for found in rest):
            return line
    return None
