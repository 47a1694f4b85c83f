"""The ready recipes, one YAML file each, and the reader of recipe files."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.recipes.explain import meant, show

__all__ = ["MAX_BYTES", "description", "find", "parse", "ready_names", "ready_text", "unknown_name"]

MAX_BYTES = 1 << 20
_SUFFIX = ".yaml"


def ready_names() -> list[str]:
    """The names of the ready recipes, the default first, then by name."""
    files = resources.files(__name__).iterdir()
    names = [file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX)]
    return sorted(names, key=lambda name: (name != "w8a8", name))


def unknown_name(name: str) -> RecipeError:
    """The error for a name that is no ready recipe."""
    ready = ready_names()
    return RecipeError(
        f"recipe '{name}' is unknown{meant(name, ready)}; use a .yaml file or one of {', '.join(ready)}"
    )


def find(source: str | Path) -> tuple[str, str]:
    """The YAML text of a ready recipe or a file, and how errors name it; RecipeError when there is neither."""
    if isinstance(source, str):
        if source in ready_names():
            return ready_text(source), f"recipe '{source}'"
        if not (source.endswith((".yaml", ".yml")) or os.sep in source or os.path.lexists(source)):
            raise unknown_name(source)
    try:
        path = Path(source)
    except TypeError:
        raise RecipeError(f"recipe: expected a name, a file or a mapping, got {show(source)}") from None
    return read_file(path), f"recipe file {path}"


def ready_text(name: str) -> str:
    """The YAML text of a ready recipe, which must be one of `ready_names`."""
    return resources.files(__name__).joinpath(name + _SUFFIX).read_text("utf-8")


def description(text: str) -> str:
    """The first comment line of a recipe without its ``#``, or nothing."""
    comments = (line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#"))
    return next(comments, "")


def read_file(path: Path) -> str:
    """The text of a recipe file; RecipeError when it is missing, not a file, too large or not UTF-8."""
    try:
        if not path.is_file():
            found = "is not a file" if path.exists() else "does not exist"
            raise RecipeError(
                f"recipe file {path} {found}; give a YAML file or one of {', '.join(ready_names())}"
            )
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"recipe file {path} cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            f"recipe file {path} is larger than {MAX_BYTES} bytes; a recipe is a short YAML file"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe file {path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None


def parse(text: str, where: str) -> object:
    """The plain data of one YAML document; RecipeError, starting with ``where``, when it is not plain or malformed."""
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        text = ", ".join(part for part in (error.context, error.problem) if part)
        cure = '; quote a pattern that starts with *, as "*head*"' if "alias" in text else ""
        raise RecipeError(f"{where}:{line}: {text}{cure}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{where}: is nested too deeply; a recipe needs five levels") from None
    except ValueError as error:  # numbers and dates that look right but are not
        raise RecipeError(f"{where}: holds a malformed number or date: {error}") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases (they can expand to gigabytes) and duplicate keys (one would silently vanish)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            text = "aliases (*name) are not accepted"
            raise yaml.composer.ComposerError(None, None, text, self.get_mark())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                text = f"key '{key.value}' is given twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-5 as text, because it has no dot; nobody means that.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
