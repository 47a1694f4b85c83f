"""What a recipe accepts and what it says about the rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from calib.ranges import RANGES, Entropy, Percentile
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import QuantizationError, RecipeError, VerificationError
from onnxslim_ptq.recipe import Recipe, describe, recipe_names
from onnxslim_ptq.recipes import MAX_BYTES

BY_RANGE = [f"w8a8-{name}" for name in (
    "entropy", "histogram", "minmax", "mixed", "mse", "output-mse", "percentile")]  # fmt: skip
SMOOTHED = {
    "w8a8": "auto_smooth",
    "w8a8-transformer": "split_outliers, auto_smooth",
    "w8a8-smoothquant": "smoothquant",
    "w8a8-m3": "awq",
    "w8a8-m4": "iter_smooth",
    "w8a8-m6": "flex_smooth",
    "w8a8-osl": "outlier_suppression_lite",
    "w8a8-osp": "outlier_suppression_plus",
}
READY = recipe_names()


def step(**keys: Any) -> dict[str, Any]:
    return {"type": "quantize", **keys}


def recipe(*steps: Mapping[str, Any]) -> Recipe:
    return Recipe.load({"steps": list(steps)})


def refused(source: Any, *parts: str) -> None:
    """Loading fails with one line that holds every part."""
    with pytest.raises(RecipeError) as caught:
        Recipe.load(source)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_errors_are_of_the_family() -> None:
    assert issubclass(RecipeError, QuantizationError)
    assert issubclass(RecipeError, ValueError)
    assert issubclass(VerificationError, QuantizationError)


class TestReady:
    def test_names(self) -> None:
        assert recipe_names()[0] == "w8a8"
        assert recipe_names()[1:] == sorted(READY[1:])
        assert {*BY_RANGE, *SMOOTHED} <= set(READY)

    @pytest.mark.parametrize("name", BY_RANGE)
    def test_ranges(self, name: str) -> None:
        assert [s.act.range.type for s in Recipe.load(name).steps] == [name[5:].replace("-", "_")]

    @pytest.mark.parametrize("name", SMOOTHED)
    def test_smoothing(self, name: str) -> None:
        *smooth, last = Recipe.load(name).steps
        assert ", ".join(step.type for step in smooth) == SMOOTHED[name]
        assert last.act.range.type == "auto"

    @pytest.mark.parametrize("name", READY)
    def test_every_one_loads_and_is_described(self, name: str) -> None:
        loaded = Recipe.load(name)
        assert loaded.target == ("generic" if name == "w4a8-dynamic" else "cpu")
        assert len(describe(name)) > 20
        assert "#" not in describe(name)

    def test_percentile(self) -> None:
        assert Recipe.load("w8a8-percentile").steps[0].act.range.build() == Percentile(99.99)

    def test_unknown_name(self) -> None:
        refused("w8a9", "recipe 'w8a9' is unknown (did you mean 'w8a8'?)", *READY, ".yaml")
        refused("", "recipe '' is unknown")
        with pytest.raises(
            RecipeError, match=r"recipe 'none' is unknown; use a .yaml file or one of .*w8a8, "
        ):
            describe("none")

    def test_a_recipe_is_taken_as_it_is(self) -> None:
        loaded = Recipe.load("w8a8")
        assert Recipe.load(loaded) is loaded

    @pytest.mark.parametrize("source", [None, 3, b"w8a8", []])
    def test_other_things(self, source: object) -> None:
        refused(source, "recipe: expected a name, a file or a mapping, got ")


class TestFile:
    def save(self, tmp_path: Path, content: str | bytes) -> Path:
        path = tmp_path / "r.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def test_path_and_text_and_any_suffix(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, "steps: [{type: quantize}]")
        other = path.rename(tmp_path / "mine")
        assert Recipe.load(other) == Recipe.load(str(other)) == recipe(step())

    def test_byte_order_mark(self, tmp_path: Path) -> None:
        assert Recipe.load(self.save(tmp_path, "\ufeffsteps: [{type: quantize}]")) == recipe(step())

    def test_a_file_beside_a_ready_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.save(tmp_path, "target: generic\nsteps: [{type: quantize}]").rename(tmp_path / "w8a8")
        monkeypatch.chdir(tmp_path)
        assert Recipe.load("w8a8").target == "cpu"
        assert Recipe.load("./w8a8").target == "generic"

    def test_errors_name_the_file_and_the_key(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, "steps: [{type: quantize, weight: {dtype: int3}}]")
        refused(path, f"recipe file {path}: steps[0].weight.dtype: got 'int3'; use int8, int4, uint4")

    def test_exponents_without_a_dot_are_numbers(self, tmp_path: Path) -> None:
        text = "steps: [{type: quantize, act: {range: {type: histogram, step: 1e-5}}}]"
        assert Recipe.load(self.save(tmp_path, text)).steps[0].act.range.options == {"step": 1e-5}

    def test_missing(self, tmp_path: Path) -> None:
        refused(str(tmp_path / "no.yaml"), "no.yaml does not exist", "w8a8-minmax")
        refused("no-such.yaml", "recipe file no-such.yaml does not exist")
        refused("dir/none", "recipe file dir/none does not exist")
        refused("x" * 5000, "is unknown")
        refused("x" * 5000 + ".yaml", "recipe file x")
        refused(tmp_path, "is not a file")

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            ("", "expected a mapping with keys version, target, data, names, passes, steps, got null"),
            ("- a", "expected a mapping with keys version, target, data, names, passes, steps, got ['a']"),
            ("steps: [", "line 1, column 9: while parsing a flow node, expected the node content"),
            ("a: 1\nsteps: []\na: 2", "line 3, column 1: key 'a' is given twice; keep one"),
            ("a: &x [1]\nb: *x", "line 2, column 6: aliases (*name) are not accepted"),
            ("include: [*head*]", 'line 1, column 16: while scanning an alias'),
            ("include: [*head*]", 'quote a pattern that starts with *, as "*head*"'),
            ("include: *head", 'quote a pattern that starts with *, as "*head*"'),
            ("a: 1\n---\nb: 2", "expected a single document"),
            ("!!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
            ("? [a]\n: b", "found unhashable key"),
            ("[" * 20000, "is nested too deeply"),
            ("version: " + "9" * 5000, "holds a malformed number or date"),
            ("version: 2001-99-99", "holds a malformed number or date: month must be in 1..12"),
            ("a: \0", "unacceptable character #x0000"),
            (b"\xff\xfe\xfa", "is not UTF-8 text: invalid start byte at byte 0"),
            (b"#" * (MAX_BYTES + 1), f"is larger than {MAX_BYTES} bytes"),
        ],
    )  # fmt: skip
    def test_refused(self, tmp_path: Path, content: str | bytes, text: str) -> None:
        path = self.save(tmp_path, content)
        refused(path, f"recipe file {path}", text)


class TestSchema:
    def test_defaults(self) -> None:
        loaded = recipe(step())
        first = loaded.steps[0]
        assert (loaded.version, loaded.target) == (1, "cpu")
        assert (first.include, first.exclude, first.rounder.type) == (("*",), (), "rtn")
        weight = {
            "dtype": "int8",
            "per": "channel",
            "group_size": None,
            "symmetric": True,
            "full_range": False,
        }
        assert first.weight.model_dump() == weight
        act = {
            "dtype": "auto",
            "per": "tensor",
            "when": "static",
            "timestep_sep": None,
            "symmetric": "auto",
            "range": {"type": "auto"},
        }
        assert first.act.model_dump() == act

    def test_any_mapping(self) -> None:
        assert Recipe.load(MappingProxyType({"steps": (step(),)})) == recipe(step())

    @pytest.mark.parametrize("target", TARGETS)
    def test_targets(self, target: str) -> None:
        assert Recipe.load({"target": target, "steps": [step()]}).target == target

    @pytest.mark.parametrize(
        ("source", "text"),
        [
            ({}, "steps: is missing"),
            ({"steps": []}, "steps: give at least one, got []"),
            ({"steps": "quantize"}, "steps: expected a list, got 'quantize'; write ['quantize']"),
            (
                {"stesp": []},
                "stesp: unknown key (did you mean 'steps'?); accepted: version, target, data, names, passes, steps",
            ),
            (
                {"steps": [step()], 1: 2},
                "1: unknown key; accepted: version, target, data, names, passes, steps",
            ),
            ({"steps": [step()], "version": 2}, "version: got 2; use 1"),
            ({"steps": [step()], "version": "1"}, "version: got '1'; use 1"),
            (
                {"steps": [step()], "target": "gpu"},
                "target: 'gpu' is unknown; use one of " + ", ".join(TARGETS),
            ),
            (
                {"steps": [step()], "target": "tensorrrt"},
                "target: 'tensorrrt' is unknown (did you mean 'tensorrt'?); use one of cpu, ",
            ),
            ({"steps": [step()], "target": None}, "target: expected text, got null"),
        ],
    )
    def test_top(self, source: Mapping[Any, Any], text: str) -> None:
        refused(source, f"recipe: {text}")

    @pytest.mark.parametrize(
        ("second", "text"),
        [
            ({}, ".type: is missing; use quantize"),
            ("quantize", ": expected a mapping with keys type, include, "),
            ("quantize", "; write {type: quantize}"),
            ({"type": "iter_smooth", "alpha": 0.9},
             ".type: iter_smooth changes the float model, so it comes before every quantize step"),
            ({"type": "gptq"}, ".type: got 'gptq'; use quantize, "),
            ({"type": "quantise"}, ".type: got 'quantise'; use quantize"),
            ({"type": ["quantize"]}, ".type: got ['quantize']; use quantize"),
            (step(includes=["*"]), ".includes: unknown key (did you mean 'include'?); accepted: type, include, "),
            (step(include="*q*"), ".include: expected a list, got '*q*'; write ['*q*']"),
            (step(include=[]), ".include: give at least one, got []"),
            (step(exclude=None), ".exclude: expected a list, got null"),
            (step(exclude=["a", 3]), ".exclude[1]: expected text, got 3"),
            (step(exclude=["a", ""]), ".exclude[1]: pattern '' is empty; use a glob"),
            (step(include=["re:("]), ".include[0]: pattern 're:(' is not a regular expression: missing )"),
            (step(rounder={}), ".rounder.type: is missing; use adaround, admm, clip, gptq, rtn, squant, ssz"),
            (step(rounder="rtn"), ".rounder: expected a mapping with keys type, got 'rtn'; write {type: rtn}"),
            (
                step(rounder={"type": "gtpq"}),
                ".rounder.type: 'gtpq' is unknown (did you mean 'gptq'?); use one of adaround, admm, clip, gptq, rtn, ",
            ),
            (
                step(rounder={"type": "gptq", "blok": 1}),
                ".rounder.blok: unknown key (did you mean 'block'?); rounder 'gptq' takes block, damping, act_order, ",
            ),
            (
                step(rounder={"type": "rtn", "block": 1}),
                ".rounder.block: unknown key; rounder 'rtn' takes no options",
            ),
            (
                step(rounder={"type": "gptq", "block": 0}),
                ".rounder.block: expected a whole number from 1 to 65536, got 0",
            ),
            (step(rounder={"type": "gptq", "block": 1.5}), ".rounder.block: expected a whole number, got 1.5"),
            (step(rounder={"type": "gptq", "act_order": 1}), ".rounder.act_order: expected true or false, got 1"),
            (
                step(rounder={"type": "adaround", "damping": "x"}),
                ".rounder.damping: expected a number, got 'x'",
            ),
            (step(weight={"dtype": "int3"}), ".weight.dtype: got 'int3'; use int8, int4, uint4"),
            (step(weight={"dtype": "int4"}), ".weight: integer kernels take symmetric int8 weights"),
            (step(weight={"symmetric": False}), "use act: null for such weights"),
            (step(weight={"per": "block"}), ".weight.per: got 'block'; use channel, tensor, group"),
            (step(weight={"per": "group"}), ".weight.group_size: per: group and group_size belong together"),
            (step(weight={"group_size": 32}), ".weight.group_size: per: group and group_size belong together"),
            (step(weight={"per": "group", "group_size": 48}), ".weight.group_size: 48 is no power of two"),
            (step(weight={"per": "group", "group_size": 8}), ".weight.group_size: "),
            (step(weight={"axis": 0}), ".weight.axis: unknown key; accepted: dtype, per, group_size, symmetric"),
            (step(weight=None), ".weight: expected a mapping with keys dtype, per, group_size"),
            (step(act={"per": "token"}), ".act.when: per: token and when: dynamic belong together"),
            (step(act={"when": "dynamic"}), ".act.when: per: token and when: dynamic belong together"),
            (step(act={"per": "token", "when": "dynamic", "range": {"type": "mse"}}),
             ".act.range: a per-token scale is found while the model runs"),
            (step(act={"per": "channel"}), ".act.per: got 'channel'; use tensor, token"),
            (step(act={"dtype": "int16"}), ".act.dtype: got 'int16'; use auto, int8, uint8"),
            (step(act={"symmetric": "yes"}), ".act.symmetric: got 'yes'; use auto, true, false"),
            (step(added_bias="int8"), ".added_bias: got 'int8'; use float, int32"),
            (step(act={"dtype": "x" * 99}), "xxx...; use auto"),
        ],
    )  # fmt: skip
    def test_step(self, second: Any, text: str) -> None:
        refused({"steps": [step(), second]}, "recipe: steps[1]", text)


class TestRange:
    @pytest.mark.parametrize("name", RANGES)
    def test_every_method_builds(self, name: str) -> None:
        config = recipe(step(act={"range": {"type": name}})).steps[0].act.range
        assert config.build() == RANGES[name]()
        assert config.options == {}

    @pytest.mark.parametrize("name", ["auto", "output_mse"])
    def test_ranges_of_the_step(self, name: str) -> None:
        assert recipe(step(act={"range": {"type": name}})).steps[0].act.range.build() is None
        refused(
            {"steps": [step(act={"range": {"type": name, "levels": 3}})]},
            f"steps[0].act.range.levels: unknown key; range '{name}' takes no options",
        )

    def test_options(self) -> None:
        config = recipe(step(act={"range": {"type": "entropy", "bins": 512}})).steps[0].act.range
        assert config.build() == Entropy(512)
        assert (
            recipe(step(act={"range": {"type": "percentile", "percentile": 99}})).steps[0].act.range.build()
        )

    @pytest.mark.parametrize(
        ("given", "text"),
        [
            ("mse", ": expected a mapping with keys type, got 'mse'; write {type: mse}"),
            ({}, ".type: is missing; use auto, output_mse, easy_quant, ema, entropy, "),
            ({"type": 3}, ".type: expected text, got 3"),
            ({"type": "percentil"}, ".type: 'percentil' is unknown (did you mean 'percentile'?); use one of auto, "),
            ({"type": "percentile", "percentil": 99},
             ".percentil: unknown key (did you mean 'percentile'?); range 'percentile' takes percentile"),
            ({"type": "percentile", "percentile": 101}, ".percentile: expected a number from 50 to 100, got 101"),
            ({"type": "percentile", "percentile": "99"}, ".percentile: expected a number, got '99'"),
            ({"type": "percentile", "percentile": True}, ".percentile: expected a number, got true"),
            ({"type": "percentile", "percentile": None}, ".percentile: expected a number, got null"),
            ({"type": "percentile", "percentile": float("nan")}, ".percentile: expected a number from 50 to 100"),
            ({"type": "entropy", "bins": 600.5}, ".bins: expected a whole number, got 600.5"),
            ({"type": "mse", "kinds": ["minmax"]}, ".kinds: unknown key; range 'mse' takes no options"),
            ({"type": "minmax", "__pydantic_config__": {}}, ".__pydantic_config__: unknown key"),
        ],
    )  # fmt: skip
    def test_refused(self, given: Any, text: str) -> None:
        refused({"steps": [step(act={"range": given})]}, f"recipe: steps[0].act.range{text}")
