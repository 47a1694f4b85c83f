"""Runs the export scripts with a Python of their own, which holds torch; the zoo itself never imports torch.

The environment is made in the cache on first need (about 1.5 GB with a CPU build of torch; pip's own
settings decide which build of torch it gets).
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from .cache import build, run

_PINS = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "accelerate==1.15.0",
    "gguf==0.19.0",
    "tokenizers==0.23.3",
    "sentencepiece==0.2.3",
    "onnx==1.23.2",
    "onnxscript==0.7.2",
    "numpy==2.4.6",
)
_REVISION = 1  # part of the file names: raise it when a script changes what it writes


def export(name: str, script: str, *arguments: str | Path) -> Path:
    """The folder that `script OUT ARGUMENTS...` filled, made once."""
    return build(f"exports/{name}-r{_REVISION}", partial(_run_script, name, script, arguments))


def _run_script(name: str, script: str, arguments: tuple[str | Path, ...], out: Path) -> None:
    python = build(f"export-venv-r{_REVISION}", _make_venv) / "bin" / "python"
    out.mkdir()
    file = Path(__file__).with_name(script)
    command = [str(python), str(file), str(out), *map(str, arguments)]
    run(command, f"export of {name}", f"see the full output of: {file.name} OUT ARGUMENTS...", cwd=out)


def _make_venv(path: Path) -> None:
    cure = "make sure that pip finds torch 2.13.0 for this Python, and retry"
    run([sys.executable, "-m", "venv", str(path)], "export environment", "install the venv module of Python")
    pip = [str(path / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--retries", "1", *_PINS], "export environment", cure)
    for script in (path / "bin").iterdir():  # their first lines name the folder in which they were made
        if not script.name.startswith(("python", "activate")):
            os.unlink(script)
