"""The documents say what the code does: examples run, links lead somewhere, tables and options match the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import typer
import yaml
from pydantic import BaseModel

from calib.ranges import RANGES
from calib.readers.feedback import _KEPT_BYTES
from calib.readers.files import _KINDS
from calib.readers.limits import DEFAULT_LIMITS
from calib.readers.preprocess import PRESETS
from calib.readers.tokens import _MAX_FILE
from onnxslim_ptq import cli
from onnxslim_ptq.cli import app, main
from onnxslim_ptq.core.targets import TARGETS, BiasForm
from onnxslim_ptq.graph.forms import APPROXIMATE, EXACT
from onnxslim_ptq.graph.optimize import PASSES
from onnxslim_ptq.recipe import STEP_RANGES, QuantizeStep, Recipe, recipe_names
from onnxslim_ptq.recipes.data import DataConfig, PreprocessConfig, TextConfig
from onnxslim_ptq.rounders import ROUNDERS
from onnxslim_ptq.steps import STEPS, auto_smooth
from onnxslim_ptq.steps.quantize import _FEWEST, _MOST
from onnxslim_ptq.steps.ranges import _COUNTED
from onnxslim_ptq.steps.smoothing import GroupsConfig
from tests.test_imports import ORDER

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
PROGRAM = re.compile(r"^(?:python -m onnxslim_ptq|onnxslim-ptq) (?P<arguments>.*)$")
TO_COME = "not available yet"
WRITTEN = [
    page
    for page in PAGES
    if page.name not in ("benchmarks.md", "benchmarks-calib.md", "benchmarks-session.md")
]  # the others are generated, by another program


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def _blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def _only_blocks(text: str, language: str) -> str:
    """The blocks of that language, every other line empty: errors then show the lines of the document."""
    kept, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == f"```{language}"
            line = ""
        kept.append(line if inside else "")
    return "\n".join(kept)


def _table(text: str, header: str) -> list[list[str]]:
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


def _examples(page: Path) -> list[list[str]]:
    """The arguments of the example commands that can run here: those on the digits model."""
    commands = []
    for block in _blocks(page.read_text("utf-8"), "console"):
        for line in block.splitlines():
            found = PROGRAM.match(line.removeprefix("$ ")) if line.startswith("$ ") else None
            if found is not None:
                commands.append(shlex.split(found["arguments"], comments=True))
    return commands


def _options() -> dict[str, dict[str, bool]]:
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``tools/digits`` in it, as in the repository."""
    shutil.copytree(ROOT / "tools" / "digits", tmp_path / "tools" / "digits")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _with(language: str) -> list[Any]:
    return [
        pytest.param(page, id=_name(page)) for page in PAGES if _blocks(page.read_text("utf-8"), language)
    ]


class TestExamples:
    @pytest.mark.parametrize("page", _with("python"))
    def test_python_runs(self, page: Path, folder: Path) -> None:
        """All blocks of a page in one fresh interpreter, in order."""
        script = folder / f"{page.stem}.py"
        script.write_text(_only_blocks(page.read_text("utf-8"), "python"), "utf-8")
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; runpy.run_path({str(script)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("page", _with("yaml"))
    def test_yaml_is_a_recipe(self, page: Path) -> None:
        for block in _blocks(page.read_text("utf-8"), "yaml"):
            Recipe.load(yaml.safe_load(block))

    @pytest.mark.parametrize("page", _with("console"))
    def test_commands_run(self, page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in _examples(page):
            if "model.onnx" not in arguments:  # stands for a model of the reader's
                assert main(arguments) == 0, (arguments, capsys.readouterr().err)

    def test_the_readme_writes_what_it_says(self, folder: Path) -> None:
        command = next(a for a in _examples(ROOT / "README.md") if "tools/digits/digits.onnx" in a)
        assert main(command) == 0
        assert sorted(p.name for p in (folder / "out").iterdir()) == ["digits.json", "digits.onnx"]

    @pytest.mark.parametrize("page", PAGES, ids=_name)
    def test_make_targets_exist(self, page: Path) -> None:
        made = set(re.findall(r"^([a-z-]+):", _text("Makefile"), re.MULTILINE))
        named = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", page.read_text("utf-8")))
        assert named <= made


class TestOptions:
    @pytest.mark.parametrize("page", WRITTEN, ids=_name)
    def test_every_option_exists(self, page: Path) -> None:
        """In ``--help`` of some command, unless the paragraph says that it is still to come."""
        known = _options()
        shown = {option for options in known.values() for option, hidden in options.items() if not hidden}
        hidden = {option for options in known.values() for option in options} - shown
        for paragraph in page.read_text("utf-8").split("\n\n"):
            named = set(OPTION.findall(paragraph)) - shown - {"--help"}
            assert not named - hidden, f"no command has {named - hidden}"
            assert not named or TO_COME in paragraph, f"{named} is {TO_COME}"

    @pytest.mark.parametrize("page", _with("console"))
    def test_example_commands_use_their_own_options(self, page: Path) -> None:
        known = _options()
        for arguments in _examples(page):
            command = arguments[0] if arguments[0] in known else "quantize"
            assert {a for a in arguments if a.startswith("--")} <= set(known[command])

    def test_every_command_is_in_the_table(self) -> None:
        rows = _table(_text("docs/commands.md"), "| command |")
        assert {re.findall(r"[a-z-]+", row[0])[0] for row in rows} == set(_options()) - {""}


class TestLinks:
    @pytest.mark.parametrize("page", PAGES, ids=_name)
    def test_they_resolve(self, page: Path) -> None:
        text = FENCE.sub("", page.read_text("utf-8"))
        for target in re.findall(r"(?<!`)\[[^\]`]*(?:`[^`]*`)?[^\]`]*\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+://", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert file.is_relative_to(ROOT), target
            assert not anchor or anchor in _anchors(file), target

    def test_every_page_is_reached_from_the_readme(self) -> None:
        linked = set(re.findall(r"\]\(((?:docs/)?\w[\w-]*\.md)\)", _text("README.md")))
        assert {_name(page) for page in PAGES} - {"README.md"} <= linked

    def test_source_files_named_in_the_text_exist(self) -> None:
        for page in PAGES:
            for name in re.findall(
                r"`((?:calib|onnxslim_ptq|tests|tools)/[\w/.]+)`", page.read_text("utf-8")
            ):
                assert (ROOT / name).exists() or name == "calib/ranges/shrunk.py", f"{_name(page)}: {name}"


def _anchors(page: Path) -> set[str]:
    """The anchors a Markdown renderer gives to headings: lower case, punctuation dropped, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestExitCodes:
    def test_the_readme_lists_them_all(self) -> None:
        listed = [int(code) for row in _table(_text("README.md"), "| code |") for code in row[0].split(",")]
        codes = (
            cli.OK, cli.UNEXPECTED, cli.BAD_INPUT, cli.NOT_VERIFIED, cli.NO_DEVICE, cli.GOAL_MISSED,
            cli.INTERRUPTED, cli.TERMINATED,
        )  # fmt: skip
        assert listed == list(codes)

    @pytest.mark.parametrize(
        ("more", "code", "words"),
        [
            ([], cli.OK, "done and verified"),
            (["--recipe", "nonsense"], cli.BAD_INPUT, "wrong argument, recipe, data or model"),
            (["--min-sqnr", "90"], cli.NOT_VERIFIED, "verification failed"),
            (["--device", "npu"], cli.NO_DEVICE, "device is not available"),
        ],
    )
    def test_they_mean_what_it_says(self, more: list[str], code: int, words: str, folder: Path) -> None:
        rows = {row[0]: row[1] for row in _table(_text("README.md"), "| code |")}
        assert words in rows[str(code)]
        assert main(["tools/digits/digits.onnx", "out.onnx", "--calib", "tools/digits/calib", *more]) == code
        assert (folder / "out.onnx").exists() is (code == cli.OK)


class TestTables:
    def test_targets(self) -> None:
        """The README says of each target whether it is available, its activations and its biases."""
        rows = {re.findall(r"`(\w+)`", row[1])[0]: row for row in _table(_text("README.md"), "| target |")}
        assert set(rows) == set(TARGETS)
        for name, target in TARGETS.items():
            _, _, state, form = rows[name]
            assert state.startswith("available")
            symmetric = "symmetric " if target.symmetric_activation else ""
            bias = "int32" if target.bias is BiasForm.INT32 else "float"
            kind = {"qdq": "QDQ", "ascend": "AscendQuant", "qoperator": "QLinear operators"}[target.exporter]
            assert form == f"{kind}, {symmetric}{target.activation} activations, {bias} biases"

    def test_recipe_keys(self) -> None:
        rows = {row[0].strip("`"): row for row in _table(_text("docs/recipes.md"), "| key |")}
        keys = {
            "version",
            "target",
            "data",
            "names",
            "passes",
            "steps",
            *(f"steps[].{key}" for key in _keys(QuantizeStep)),
        }
        assert set(rows) == keys | {"steps[].act.range.…", "steps[].rounder.…"}

    def test_data_keys(self) -> None:
        text = _text("docs/calibration-data.md")
        for header, model in (
            ("| key of `data` |", DataConfig),
            ("| key of `data.preprocess` |", PreprocessConfig),
            ("| key of `data.text` |", TextConfig),
        ):
            rows = _table(text, header)
            assert {key for row in rows for key in re.findall(r"`(\w+)`", row[0])} == set(model.model_fields)
        assert [row[0].strip("`") for row in _table(text, "| preset |")] == list(PRESETS)
        named = {suffix for row in _table(text, "| path |") for suffix in re.findall(r"`(\.\w+)`", row[0])}
        assert named == set(_KINDS)

    def test_recipe_defaults(self) -> None:
        step = QuantizeStep(type="quantize")
        for key, _, default in _table(_text("docs/recipes.md"), "| key |"):
            if default.startswith("`") and "[]." in key:
                found: Any = step
                for part in key.strip("`").split(".")[1:]:
                    found = getattr(found, part)
                plain = list(found) if isinstance(found, tuple) else found
                assert yaml.safe_load(default.strip("`")) == plain, key

    def test_ready_recipes(self) -> None:
        text = _text("docs/recipes.md")
        rows = _table(text, "| recipe | range")
        listed = {re.findall(r"`([\w-]+)`", row[0])[0]: re.findall(r"`(\w+)`", row[1])[0] for row in rows}
        assert listed == {name: Recipe.load(name).steps[-1].act.range.type for name in listed}
        smoothed = _table(text, "| recipe | smoothing")
        for row in smoothed:
            (name,), step = re.findall(r"`([\w-]+)`", row[0]), re.findall(r"`(\w+)`", row[1])[0]
            assert Recipe.load(name).steps[0].type == step
        told = re.findall(r"^\| `([\w-]+)`(?:, `(-\w+)`, `(-\w+)`)?", text, re.MULTILINE)
        names = {n for name, *ends in told for n in (name, *(name.rpartition("-")[0] + e for e in ends if e))}
        assert set(recipe_names()) <= names

    def test_smoothing_steps(self) -> None:
        """Every step, with its own keys and their defaults."""
        rows = {
            re.findall(r"`(\w+)`", r[0])[0]: r[1]
            for r in _table(_text("docs/recipes.md"), "| smoothing step")
        }
        assert set(rows) == set(STEPS)
        for name, told in rows.items():
            fields = {k: f for k, f in STEPS[name].config.model_fields.items() if k != "type"}
            own = {k for k in fields if k not in GroupsConfig.model_fields}
            assert own == set(re.findall(r"`(\w+)`", told)) - {"groups"}
            for key, default in re.findall(r"`(\w+)` (\[.*?\]|[\w.-]+)", told):
                found = fields[key].default
                plain = [getattr(v, "value", v) for v in found] if isinstance(found, tuple) else found
                given = yaml.safe_load(default)
                assert (float(given) if isinstance(plain, float) else given) == plain, (name, key)

    def test_recipe_errors(self) -> None:
        for given, told in _table(_text("docs/recipes.md"), "| recipe | error"):
            step = yaml.safe_load("{type: quantize, " + given.strip("`") + "}")
            parts = [re.escape(part) for part in told.strip("`").split("…")]
            with pytest.raises(ValueError, match=".*".join(parts)):
                Recipe.load({"steps": [step]})

    def test_rounders(self) -> None:
        """Every rounder with every option and its default."""
        rows = {row[0].strip("`"): row for row in _table(_text("docs/rounders.md"), "| type | how")}
        assert set(rows) == set(ROUNDERS)
        for name, (_, _, data, options) in rows.items():
            made = ROUNDERS[name]()
            assert data == ("yes" if made.needs_gram else "no")
            told = dict(re.findall(r"`(\w+)` ([\w.]+)", options))
            assert told == {f.name: str(getattr(made, f.name)).lower() for f in dataclasses.fields(made)}, (
                name
            )  # type: ignore[arg-type]
            for key, low, high in re.findall(r"`(\w+)` \S+ \((\S+) to (\S+)\)", options):
                kind = type(getattr(made, key))
                for bound, step in ((kind(float(low)), -1), (kind(float(high)), 1)):
                    ROUNDERS[name](**{key: bound})
                    beyond = bound + step if kind is int else float(np.nextafter(bound, step * np.inf))
                    with pytest.raises(ValueError, match=key):
                        ROUNDERS[name](**{key: beyond})

    def test_ranges(self) -> None:
        """Every method with every option and its default."""
        text = _text("docs/ranges.md")
        rows = {row[0].strip("`"): row[2] for row in _table(text, "| type |")}
        assert set(rows) == set(RANGES)
        for name, method in RANGES.items():
            options = {f.name: f.default for f in dataclasses.fields(method)}  # type: ignore[arg-type]
            found = dict(re.findall(r"`(\w+)` (\S+)", rows[name]))
            told = {k: v.strip('"') if isinstance(options[k], str) else float(v) for k, v in found.items()}
            assert told == options
            for key, low, high in re.findall(r"`(\w+)` \S+ \((\S+) to (\S+)\)", rows[name]):
                kind = type(options[key])
                for bound, step in ((kind(float(low)), -1), (kind(float(high)), 1)):
                    method(**{key: bound})
                    beyond = bound + step if kind is int else float(np.nextafter(bound, step * np.inf))
                    with pytest.raises(ValueError, match=key):
                        method(**{key: beyond})
        assert all(f"**`{name}`**" in text for name in STEP_RANGES)

    def test_passes(self) -> None:
        rows = _table(_text("docs/how-it-works.md"), "| pass |")
        assert [row[0].strip("`") for row in rows] == list(PASSES)
        rows = _table(_text("docs/how-it-works.md"), "| form |")
        named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
        assert named == [*EXACT, *APPROXIMATE]

    def test_numbers(self) -> None:
        """Constants that are tuned from time to time."""
        text = " ".join(_text("docs/how-it-works.md").split())
        assert f"about {_COUNTED:.0f} elements" in text
        assert f"on {_FEWEST} to {_MOST} calibration samples" in text
        assert f"{auto_smooth._JUDGED} of the samples judge candidates" in text
        assert f"fewer than {auto_smooth._ENOUGH} samples, {auto_smooth._SAMPLES} of them at most" in text
        assert f"no group's layers {auto_smooth._PROMISE_DB:g} dB" in text
        assert f"gains the outputs less than {auto_smooth._GAIN_DB} dB" in text
        assert f"An explicit Mul has to gain {auto_smooth._EXPLICIT_GAIN_DB} dB" in text
        limits = {row[0]: row[1] for row in _table(_text("docs/calibration-data.md"), "| limit |")}
        assert limits["one decoded sample"] == f"{DEFAULT_LIMITS.max_sample_bytes // 2**30} GiB"
        assert limits["samples"] == f"{DEFAULT_LIMITS.max_samples:,}"
        assert limits["arrays in a file"] == str(DEFAULT_LIMITS.max_arrays)
        assert limits["pixels of an image"] == f"{DEFAULT_LIMITS.max_image_pixels:,}"
        assert limits["line of text"] == f"{DEFAULT_LIMITS.max_line_bytes // 2**20} MiB"
        assert limits["tokenizer file"] == f"{_MAX_FILE // 2**20} MiB"
        assert limits["states kept between passes"].startswith(f"{_KEPT_BYTES // 2**20} MiB")

    def test_import_order(self) -> None:
        line = next(b for b in _blocks(_text("docs/design.md"), "text") if "←" in b)
        listed = [set(group.split(", ")) for group in re.split(r"\s+←\s+", line.strip())]
        exist = [{name for name in group if importlib.util.find_spec(name)} for group in ORDER]
        short = [
            {n.removeprefix("onnxslim_ptq.") for n in group} - {"onnxslim_ptq", "__main__"} for group in exist
        ]
        assert listed == short


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        kinds = [k for k in (info.annotation, *get_args(info.annotation)) if isinstance(k, type)]
        models = [k for k in kinds if issubclass(k, BaseModel)]
        if not models or len(kinds) > 1:  # a model that may be null has a row of its own
            yield prefix + name
        for model_of_key in models:
            yield from _keys(model_of_key, f"{prefix}{name}.")
