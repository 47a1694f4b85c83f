"""`python -m tools.api [--check]`: writes docs/api.md from the docstrings of what users import."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

from pydantic import BaseModel

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
PUBLIC = {
    "onnxslim_ptq": ("quantize", "Result", "Recipe", "calibrate", "analyze", "LayerSelector"),
    "onnxslim_ptq.sensitivity": ("Analysis", "Ranked"),
    "onnxslim_ptq.tuning": ("tune", "Tuned"),
    "onnxslim_ptq.reporting": ("gather_facts", "write_report"),
    "onnxslim_ptq.analysis.compare": ("compare_models", "Comparison"),
    "onnxslim_ptq.errors": (
        "QuantizationError",
        "RecipeError",
        "GraphError",
        "CalibrationError",
        "DeviceError",
        "VerificationError",
    ),
    "calib": ("collect", "gather", "Gathering", "Progress", "Probe", "Statistics", "create_session"),
    "calib.stats": ("HistogramStats", "MinMaxStats", "ChannelStats", "SpreadStats"),
}
HEAD = """# Python API

Written by `python -m tools.api` from the docstrings; a test compares. [recipes.md](recipes.md) and
[calibration-data.md](calibration-data.md) describe what the arguments may hold.
"""


def page() -> str:
    """The text of docs/api.md."""
    parts = [HEAD]
    for module, names in PUBLIC.items():
        parts.append(f"## {module}\n")
        loaded = importlib.import_module(module)
        parts += [_entry(name, getattr(loaded, name)) for name in names]
    return "\n".join(parts).rstrip() + "\n"


def _entry(name: str, value: object) -> str:
    lines = [f"### {name}\n", f"```text\n{_signature(name, value)}\n```\n", _text(value)]
    if inspect.isclass(value) and not issubclass(value, BaseException):
        lines += [
            f"* `{member}{_arguments(method)}`: {_text(method, first=True)}"
            for member, method in vars(value).items()
            if not member.startswith("_") and inspect.isfunction(method) and method.__doc__
        ]
        lines.append("")
    return "\n".join(lines)


def _signature(name: str, value: object) -> str:
    if inspect.isclass(value) and issubclass(value, BaseException):
        return f"class {name}({', '.join(base.__name__ for base in value.__bases__)})"
    if inspect.isclass(value) and issubclass(value, BaseModel):
        return f"class {name}"  # its keys are those of a recipe
    text = _arguments(value)
    if len(name) + len(text) > 100:
        text = _arguments(value, ",\n    ")
    return f"class {name}{text}" if inspect.isclass(value) else f"{name}{text}"


def _arguments(value: object, between: str = ", ") -> str:
    signature = inspect.signature(value)  # type: ignore[arg-type]
    shown, keyword_only = [], False
    for name, parameter in signature.parameters.items():
        if name == "self" or name.startswith("_"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = (
            f"{star}{name}"
            if parameter.annotation is parameter.empty
            else f"{star}{name}: {parameter.annotation}"
        )
        if parameter.default is not parameter.empty:
            text += f" = {re.sub('<.*>', '...', repr(parameter.default))}"
        shown.append(text)
    result = "" if inspect.isclass(value) else f" -> {signature.return_annotation}"
    inside = between.join(shown)
    if "\n" in between:
        inside = f"\n    {inside},\n"
    return f"({inside}){result}"


def _text(value: object, first: bool = False) -> str:
    text = re.sub(r"``(.+?)``", r"`\1`", inspect.getdoc(value) or "")
    return " ".join(text.split("\n\n")[0].split()) if first else text + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or with --check say whether it is as it would be written."""
    if arguments == ["--check"]:
        return 0 if PAGE.read_text("utf-8") == page() else 1
    PAGE.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
