"""The documents say what the code does: examples run, links lead somewhere, tables and options match the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from calib.ranges import RANGES
from calib.readers.feedback import _KEPT_BYTES
from calib.readers.files import _KINDS
from calib.readers.limits import DEFAULT_LIMITS
from calib.readers.preprocess import PRESETS
from calib.readers.tokens import _MAX_FILE
from onnxslim_ptq import cli
from onnxslim_ptq.cli import main
from onnxslim_ptq.commands.options import TARGET_HELP
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
from tests.documents import (
    COMMAND_PAGES,
    FENCE,
    OPTION,
    PAGES,
    ROOT,
    WRITTEN,
    blocks,
    examples,
    only_blocks,
    options,
    page_name,
    page_text,
    shapes,
    table,
)
from tests.test_imports import ORDER

TO_COME = "not available yet"


def _with(language: str) -> list[Any]:
    return [
        pytest.param(page, id=page_name(page)) for page in PAGES if blocks(page.read_text("utf-8"), language)
    ]


class TestExamples:
    @pytest.mark.parametrize("page", _with("python"))
    def test_python_runs(self, page: Path, folder: Path) -> None:
        """All blocks of a page in one fresh interpreter, in order."""
        script = folder / f"page_{page.stem}.py"  # the plain stem could hide a module, such as inspect
        script.write_text(only_blocks(page.read_text("utf-8"), "python"), "utf-8")
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; runpy.run_path({str(script)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        if page.name.startswith("example-"):
            assert shapes("\n".join(blocks(page.read_text("utf-8"), "text"))) == shapes(done.stdout)

    @pytest.mark.parametrize("page", _with("yaml"))
    def test_yaml_is_a_recipe(self, page: Path) -> None:
        for block in blocks(page.read_text("utf-8"), "yaml"):
            Recipe.load(yaml.safe_load(block))

    @pytest.mark.parametrize("page", [p for p in _with("console") if p.values[0] not in COMMAND_PAGES])
    def test_commands_run(self, page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in examples(page):
            if "model.onnx" not in arguments:  # stands for a model of the reader's
                assert main(arguments) == 0, (arguments, capsys.readouterr().err)

    def test_the_readme_writes_what_it_says(self, folder: Path) -> None:
        command = next(a for a in examples(ROOT / "README.md") if "tools/digits/digits.onnx" in a)
        assert main(command) == 0
        assert sorted(p.name for p in (folder / "out").iterdir()) == ["digits.json", "digits.onnx"]

    @pytest.mark.parametrize("page", PAGES, ids=page_name)
    def test_make_targets_exist(self, page: Path) -> None:
        made = set(re.findall(r"^([a-z-]+):", page_text("Makefile"), re.MULTILINE))
        named = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", page.read_text("utf-8")))
        assert named <= made


class TestOptions:
    @pytest.mark.parametrize("page", WRITTEN, ids=page_name)
    def test_every_option_exists(self, page: Path) -> None:
        """In ``--help`` of some command, unless the paragraph says that it is still to come."""
        known = options()
        shown = {option for own in known.values() for option, hidden in own.items() if not hidden}
        hidden = {option for own in known.values() for option in own} - shown
        for paragraph in page.read_text("utf-8").split("\n\n"):
            named = set(OPTION.findall(paragraph)) - shown - {"--help"}
            assert not named - hidden, f"no command has {named - hidden}"
            assert not named or TO_COME in paragraph, f"{named} is {TO_COME}"

    @pytest.mark.parametrize("page", _with("console"))
    def test_example_commands_use_their_own_options(self, page: Path) -> None:
        known = options()
        for arguments in examples(page):
            command = arguments[0] if arguments[0] in known else "quantize"
            assert {a for a in arguments if a.startswith("--")} <= set(known[command])

    def test_every_command_has_a_row_and_a_page(self) -> None:
        rows = table(page_text("docs/commands.md"), "| command |")
        assert [re.findall(r"[a-z-]+", row[0])[0] for row in rows] == [p for p in options() if p]
        assert {page.stem for page in COMMAND_PAGES} == set(options()) - {""}

    def test_the_help_names_every_target(self) -> None:
        assert re.findall(r"\w+", TARGET_HELP.replace(" or ", " ")) == list(TARGETS)

    def test_shared_options(self) -> None:
        """The overview says of each which commands take it."""
        for row in table(page_text("docs/commands.md"), "| option |"):
            for option in OPTION.findall(row[0]):
                told = set(re.findall(r"[a-z-]+", row[2]))
                taken = {command for command, own in options().items() if option in own}
                assert told == ({"all"} if taken == set(options()) - {""} else taken), option

    @pytest.mark.parametrize("page", COMMAND_PAGES, ids=page_name)
    def test_a_command_page_names_all_its_options(self, page: Path) -> None:
        """Those in its table are the command's; the others stand in the overview's table."""
        text = page.read_text("utf-8")
        own = {o for o, hidden in options()[page.stem].items() if o.startswith("--") and not hidden}
        told, shared = (
            {o for row in rows for o in OPTION.findall(row[0])}
            for rows in (
                table(text, "| option |") if "| option |" in text else [],
                table(page_text("docs/commands.md"), "| option |"),
            )
        )
        assert told <= own
        assert own <= told | shared


class TestLinks:
    @pytest.mark.parametrize("page", PAGES, ids=page_name)
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
        """A command's page from the overview."""
        linked = set(re.findall(r"\]\(((?:docs/)?\w[\w-]*\.md)\)", page_text("README.md")))
        commands = re.findall(r"\]\((commands/[\w-]+\.md)\)", page_text("docs/commands.md"))
        linked |= {f"docs/{name}" for name in commands}
        assert {page_name(page) for page in PAGES} - {"README.md"} <= linked

    def test_source_files_named_in_the_text_exist(self) -> None:
        for page in PAGES:
            for name in re.findall(
                r"`((?:calib|onnxslim_ptq|tests|tools)/[\w/.]+)`", page.read_text("utf-8")
            ):
                assert (ROOT / name).exists() or name == "calib/ranges/shrunk.py", (
                    f"{page_name(page)}: {name}"
                )


def _anchors(page: Path) -> set[str]:
    """The anchors a Markdown renderer gives to headings: lower case, punctuation dropped, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestExitCodes:
    def test_the_readme_lists_them_all(self) -> None:
        listed = [
            int(code) for row in table(page_text("README.md"), "| code |") for code in row[0].split(",")
        ]
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
        rows = {row[0]: row[1] for row in table(page_text("README.md"), "| code |")}
        assert words in rows[str(code)]
        assert main(["tools/digits/digits.onnx", "out.onnx", "--calib", "tools/digits/calib", *more]) == code
        assert (folder / "out.onnx").exists() is (code == cli.OK)


class TestTables:
    def test_targets(self) -> None:
        """The README says of each target whether it is available, its activations and its biases."""
        rows = {re.findall(r"`(\w+)`", row[1])[0]: row for row in table(page_text("README.md"), "| target |")}
        assert set(rows) == set(TARGETS)
        for name, target in TARGETS.items():
            _, _, state, form = rows[name]
            assert state.startswith("available")
            symmetric = "symmetric " if target.symmetric_activation else ""
            bias = "int32" if target.bias is BiasForm.INT32 else "float"
            kind = {"qdq": "QDQ", "ascend": "AscendQuant", "qoperator": "QLinear operators"}[target.exporter]
            assert form == f"{kind}, {symmetric}{target.activation} activations, {bias} biases"

    def test_recipe_keys(self) -> None:
        rows = {row[0].strip("`"): row for row in table(page_text("docs/recipes.md"), "| key |")}
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
        text = page_text("docs/calibration-data.md")
        for header, model in (
            ("| key of `data` |", DataConfig),
            ("| key of `data.preprocess` |", PreprocessConfig),
            ("| key of `data.text` |", TextConfig),
        ):
            rows = table(text, header)
            assert {key for row in rows for key in re.findall(r"`(\w+)`", row[0])} == set(model.model_fields)
        assert [row[0].strip("`") for row in table(text, "| preset |")] == list(PRESETS)
        named = {suffix for row in table(text, "| path |") for suffix in re.findall(r"`(\.\w+)`", row[0])}
        assert named == set(_KINDS)

    def test_recipe_defaults(self) -> None:
        step = QuantizeStep(type="quantize")
        for key, _, default in table(page_text("docs/recipes.md"), "| key |"):
            if default.startswith("`") and "[]." in key:
                found: Any = step
                for part in key.strip("`").split(".")[1:]:
                    found = getattr(found, part)
                plain = list(found) if isinstance(found, tuple) else found
                assert yaml.safe_load(default.strip("`")) == plain, key

    def test_ready_recipes(self) -> None:
        text = page_text("docs/recipes.md")
        rows = table(text, "| recipe | range")
        listed = {re.findall(r"`([\w-]+)`", row[0])[0]: re.findall(r"`(\w+)`", row[1])[0] for row in rows}
        assert listed == {name: Recipe.load(name).steps[-1].act.range.type for name in listed}
        smoothed = table(text, "| recipe | smoothing")
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
            for r in table(page_text("docs/recipes.md"), "| smoothing step")
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
        for given, told in table(page_text("docs/recipes.md"), "| recipe | error"):
            step = yaml.safe_load("{type: quantize, " + given.strip("`") + "}")
            parts = [re.escape(part) for part in told.strip("`").split("…")]
            with pytest.raises(ValueError, match=".*".join(parts)):
                Recipe.load({"steps": [step]})

    def test_rounders(self) -> None:
        """Every rounder with every option and its default."""
        rows = {row[0].strip("`"): row for row in table(page_text("docs/rounders.md"), "| type | how")}
        assert set(rows) == set(ROUNDERS)
        for name, (_, _, data, told_options) in rows.items():
            made = ROUNDERS[name]()
            assert data == ("yes" if made.needs_gram else "no")
            told = dict(re.findall(r"`(\w+)` ([\w.]+)", told_options))
            assert told == {f.name: str(getattr(made, f.name)).lower() for f in dataclasses.fields(made)}, (
                name
            )  # type: ignore[arg-type]
            for key, low, high in re.findall(r"`(\w+)` \S+ \((\S+) to (\S+)\)", told_options):
                kind = type(getattr(made, key))
                for bound, step in ((kind(float(low)), -1), (kind(float(high)), 1)):
                    ROUNDERS[name](**{key: bound})
                    beyond = bound + step if kind is int else float(np.nextafter(bound, step * np.inf))
                    with pytest.raises(ValueError, match=key):
                        ROUNDERS[name](**{key: beyond})

    def test_ranges(self) -> None:
        """Every method with every option and its default."""
        text = page_text("docs/ranges.md")
        rows = {row[0].strip("`"): row[2] for row in table(text, "| type |")}
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
        rows = table(page_text("docs/how-it-works.md"), "| pass |")
        assert [row[0].strip("`") for row in rows] == list(PASSES)
        rows = table(page_text("docs/how-it-works.md"), "| form |")
        named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
        assert named == [*EXACT, *APPROXIMATE]

    def test_numbers(self) -> None:
        """Constants that are tuned from time to time."""
        text = " ".join(page_text("docs/how-it-works.md").split())
        assert f"about {_COUNTED:.0f} elements" in text
        assert f"on {_FEWEST} to {_MOST} calibration samples" in text
        assert f"{auto_smooth._JUDGED} of the samples judge candidates" in text
        assert f"fewer than {auto_smooth._ENOUGH} samples, {auto_smooth._SAMPLES} of them at most" in text
        assert f"no group's layers {auto_smooth._PROMISE_DB:g} dB" in text
        assert f"gains the outputs less than {auto_smooth._GAIN_DB} dB" in text
        assert f"An explicit Mul has to gain {auto_smooth._EXPLICIT_GAIN_DB} dB" in text
        limits = {row[0]: row[1] for row in table(page_text("docs/calibration-data.md"), "| limit |")}
        assert limits["one decoded sample"] == f"{DEFAULT_LIMITS.max_sample_bytes // 2**30} GiB"
        assert limits["samples"] == f"{DEFAULT_LIMITS.max_samples:,}"
        assert limits["arrays in a file"] == str(DEFAULT_LIMITS.max_arrays)
        assert limits["pixels of an image"] == f"{DEFAULT_LIMITS.max_image_pixels:,}"
        assert limits["line of text"] == f"{DEFAULT_LIMITS.max_line_bytes // 2**20} MiB"
        assert limits["tokenizer file"] == f"{_MAX_FILE // 2**20} MiB"
        assert limits["states kept between passes"].startswith(f"{_KEPT_BYTES // 2**20} MiB")

    def test_import_order(self) -> None:
        line = next(b for b in blocks(page_text("docs/design.md"), "text") if "←" in b)
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
