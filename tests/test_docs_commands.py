"""The page of each command: its examples print what it shows, its errors are the command's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from onnxslim_ptq.cli import main
from tests.documents import COMMAND_PAGES, arguments_of, blocks, page_name, same_words, table

MACHINE = re.compile(r"cpu:|processor:|python \d|ONNX Runtime:|--device|  \w+Provider|.* x float$")
ERRORS = "| with | code |"


def _runs(page: Path) -> list[tuple[list[str], list[str]]]:
    """The page's example commands, each with the lines that it is said to print."""
    found: list[tuple[list[str], list[str]]] = []
    for block in blocks(page.read_text("utf-8"), "console"):
        for line in block.splitlines():
            arguments = arguments_of(line)
            if arguments is not None:
                found.append((arguments, []))
            elif not line.startswith("$ ") and not MACHINE.match(line):
                found[-1][1].append(line)
    return found


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=page_name)
def test_examples_and_errors(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error's arguments follow the page's first example, or are a command of their own."""
    runs = _runs(page)
    for arguments, shown in runs:
        assert main(arguments) == 0, (arguments, capsys.readouterr().err)
        printed = "\n".join(capsys.readouterr())
        missing = same_words(shown, printed)
        assert missing is None, f"{shlex.join(arguments)} does not print {missing!r} but\n{printed}"
    text = page.read_text("utf-8")
    for given, code, told, _ in table(text, ERRORS) if ERRORS in text else []:
        arguments = shlex.split(given.strip("`").replace("\\|", "|"))
        arguments = [*runs[0][0], *arguments] if given.startswith("`-") else arguments
        assert main(arguments) == int(code), (arguments, capsys.readouterr().err)
        missing = same_words([f"…{told.strip('`')}…"], capsys.readouterr().err)
        assert missing is None, f"{shlex.join(arguments)} does not say {missing!r}"
