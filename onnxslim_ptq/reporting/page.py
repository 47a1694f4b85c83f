"""Writes the page: a fixed document whose script builds everything from one block of JSON.

Names come from a model that may be hostile. They travel as JSON whose angle brackets are escaped, the script only ever
sets text, and the page's policy forbids loading anything; so no template engine is needed, and none could forget.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = ["render_page", "write_report"]

_PLACE = "/*DATA*/"


def render_page(facts: Mapping[str, Any]) -> str:
    """The page of ``facts`` (`gather_facts`)."""
    document = files("onnxslim_ptq.reporting").joinpath("page.html").read_text("utf-8")
    text = json.dumps(_strict(facts), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    before, after = document.split(_PLACE)
    return before + text + after


def write_report(facts: Mapping[str, Any], path: Path) -> None:
    """Write the page, whole or not at all."""
    page = render_page(facts).encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o640)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
