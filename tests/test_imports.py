"""The rules that keep the packages in order, checked on the source text: who imports whom, sizes, banned calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("calib", "onnxslim_ptq")
MAX_LINES = 350

# Left never imports right; names in one group may import each other. "onnxslim_ptq" is the package's __init__,
# which re-exports the API.
ORDER: tuple[frozenset[str], ...] = (
    frozenset({"calib"}),
    frozenset({"onnxslim_ptq.errors", "onnxslim_ptq.cpu"}),
    frozenset({"onnxslim_ptq.core"}),
    frozenset({"onnxslim_ptq.rounders"}),
    frozenset({"onnxslim_ptq.graph"}),
    frozenset({"onnxslim_ptq.export"}),
    frozenset({"onnxslim_ptq.workspace"}),
    frozenset({"onnxslim_ptq.steps"}),
    frozenset({"onnxslim_ptq.recipe", "onnxslim_ptq.recipes", "onnxslim_ptq.resolution"}),
    frozenset({"onnxslim_ptq.asked"}),
    frozenset({"onnxslim_ptq.samples", "onnxslim_ptq.recorded", "onnxslim_ptq.job"}),
    frozenset({"onnxslim_ptq.analysis"}),
    frozenset({"onnxslim_ptq.pipeline"}),
    frozenset(
        {
            "onnxslim_ptq.api",
            "onnxslim_ptq.calibration",
            "onnxslim_ptq.exporting",
            "onnxslim_ptq.reporting",
            "onnxslim_ptq.selector",
            "onnxslim_ptq.sensitivity",
            "onnxslim_ptq.tuning",
            "onnxslim_ptq",
        }
    ),
    frozenset(
        {
            "onnxslim_ptq.frontends",
            "onnxslim_ptq.doctor",
            "onnxslim_ptq.commands",
            "onnxslim_ptq.cli",
            "onnxslim_ptq.__main__",
        }
    ),
)
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}
MAY_PRINT = {"onnxslim_ptq.cli", "onnxslim_ptq.commands", "onnxslim_ptq.__main__"}
NOT_IMPORTED = ("tools", "tests")
ONNXRUNTIME_SEAM = "calib.provider"


def _sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _module(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer(module: str) -> str:
    """The name in ORDER that a module belongs to: `calib`, or the first two parts of `onnxslim_ptq.x.y`."""
    parts = module.split(".")
    return parts[0] if parts[0] != "onnxslim_ptq" else ".".join(parts[:2])


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import, wherever it stands.

    `from p import name` yields both `p` and `p.name`, since only the importer's file is read; for the root of
    onnxslim_ptq it yields the layer `name` alone where there is one, so that importing a layer is not taken for
    importing the API.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if f"{base}.{alias.name}" in RANK else base


def _wrong_imports(tree: ast.AST, module: str, is_package: bool) -> list[str]:
    mine, wrong = _layer(module), []
    for line, name in _imports(tree, module, is_package):
        top = name.split(".")[0]
        if top in NOT_IMPORTED or (top == "onnxruntime" and module != ONNXRUNTIME_SEAM):
            wrong.append(f"line {line}: imports {name}")
        elif top in PACKAGES:
            other = _layer(name)
            if other not in RANK:
                wrong.append(f"line {line}: {other} has no place in ORDER")
            elif RANK[other] > RANK[mine]:
                wrong.append(f"line {line}: {mine} imports {name}, which comes after it")
    return wrong


def _banned(tree: ast.AST, may_print: bool) -> list[str]:
    """Calls that run code from data, and prints outside the command line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if {"pickle", "cPickle", "dill", "cloudpickle", "marshal"} & {
                name.split(".")[0] for name in names
            }:
                found.append(f"line {node.lineno}: pickle")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"line {node.lineno}: allow_pickle other than False")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in {"eval", "exec"} or (node.func.id == "print" and not may_print):
                found.append(f"line {node.lineno}: {node.func.id}()")
    return found


@pytest.mark.parametrize("path", _sources(), ids=_module)
def test_import_direction(path: Path) -> None:
    module = _module(path)
    assert _layer(module) in RANK, f"{module} has no place in ORDER"
    assert _wrong_imports(ast.parse(path.read_text()), module, path.name == "__init__.py") == []


@pytest.mark.parametrize("path", _sources(), ids=_module)
def test_nothing_banned(path: Path) -> None:
    module = _module(path)
    assert _banned(ast.parse(path.read_text()), _layer(module) in MAY_PRINT) == []
    assert path.name != "utils.py", "name the file after what it does"
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines, split the file"


@pytest.mark.parametrize(
    ("module", "source", "ok"),
    [
        ("calib.runner", "import calib.types", True),
        ("calib.runner", "from onnxslim_ptq import core", False),
        ("calib.runner", "def f():\n    import onnxslim_ptq.core.dtypes", False),
        ("onnxslim_ptq.graph.io", "from onnxslim_ptq.core.spec import Slot", True),
        ("onnxslim_ptq.graph.io", "from ..core import spec", True),
        ("onnxslim_ptq.graph.io", "from ..export import qdq", False),
        ("onnxslim_ptq.graph.io", "from .. import export", False),
        ("onnxslim_ptq.core.spec", "from onnxslim_ptq import quantize", False),
        ("onnxslim_ptq.cli", "from onnxslim_ptq import quantize", True),
        ("onnxslim_ptq.cli", "from tools import demo", False),
        ("onnxslim_ptq.cli", "import onnxslim_ptq.helpers", False),
        ("calib.provider", "import onnxruntime as ort", True),
        ("calib.runner", "import onnxruntime as ort", False),
    ],
)
def test_the_direction_check_itself(module: str, source: str, ok: bool) -> None:
    assert (_wrong_imports(ast.parse(source), module, is_package=False) == []) is ok


@pytest.mark.parametrize(
    ("source", "ok"),
    [
        ("np.load(p, allow_pickle=False)", True),
        ("np.load(p, allow_pickle=True)", False),
        ("np.load(p, allow_pickle=trust)", False),
        ("import pickle", False),
        ("from pickle import load", False),
        ("print(1)", False),
        ("eval('1')", False),
        ("session.evaluate(x)", True),
    ],
)
def test_the_banned_check_itself(source: str, ok: bool) -> None:
    assert (_banned(ast.parse(source), may_print=False) == []) is ok
