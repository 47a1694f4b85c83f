"""Property tests draw the same examples in every run, so that a red run is red again; a folder for documents."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``tools/digits`` in it, as in the repository."""
    shutil.copytree(ROOT / "tools" / "digits", tmp_path / "tools" / "digits")
    monkeypatch.chdir(tmp_path)
    return tmp_path
