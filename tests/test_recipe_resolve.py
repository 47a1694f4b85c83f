"""How the steps of a recipe become one configuration per layer; what survives a dump; patterns from outside."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from calib.ranges import RANGES, Percentile
from onnxslim_ptq.core.match import Layer
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.recipe import Recipe
from onnxslim_ptq.resolution import resolve
from tests.test_recipe import recipe, step

_ranges = st.one_of(
    st.sampled_from([*RANGES, "auto", "output_mse"]).map(lambda name: {"type": name}),
    st.floats(50, 100).map(lambda p: {"type": "percentile", "percentile": p}),
    st.integers(256, 4096).map(lambda bins: {"type": "entropy", "bins": bins}),
)
_patterns = st.sampled_from(["*", "*head*", "re:.*q_proj.*", "op:Conv", "a"])
_steps = st.fixed_dictionaries(
    {"type": st.just("quantize")},
    optional={
        "include": st.lists(_patterns, min_size=1, max_size=3),
        "exclude": st.lists(_patterns, max_size=3),
        "rounder": st.sampled_from([{"type": "rtn"}, {"type": "gptq", "block": 32}, {"type": "squant"}]),
        "weight": st.fixed_dictionaries({}, optional={"per": st.sampled_from(["channel", "tensor"]),
                                                      "dtype": st.just("int8"), "symmetric": st.just(True)}),
        "act": st.fixed_dictionaries({}, optional={"dtype": st.sampled_from(["auto", "int8", "uint8"]),
                                                   "symmetric": st.sampled_from(["auto", True, False]),
                                                   "range": _ranges}),
    },
)  # fmt: skip
_recipes = st.fixed_dictionaries(
    {
        "version": st.just(1),
        "target": st.sampled_from(list(TARGETS)),
        "steps": st.lists(_steps, min_size=1, max_size=3),
    }
)
LAYERS = [
    Layer("conv", "Conv", "conv.weight"),
    Layer("q_proj", "MatMul", "w.q"),
    Layer("down_proj", "MatMul", "w.down", "MatMul_3"),
    Layer("lm_head", "Gemm", "head"),
    Layer("a", "Gemm"),
]


class TestDump:
    @given(_recipes)
    def test_is_what_was_given(self, data: dict[str, Any]) -> None:
        assert Recipe.load(data).dump() == data

    @given(_recipes)
    def test_survives_yaml(self, data: dict[str, Any]) -> None:
        loaded = Recipe.load(data)
        again = Recipe.load(yaml.safe_load(yaml.safe_dump(loaded.dump())))
        assert again == loaded
        assert resolve(again, LAYERS) == resolve(loaded, LAYERS)

    def test_top_keys_are_written_out(self) -> None:
        assert recipe(step()).dump() == {"version": 1, "target": "cpu", "steps": [{"type": "quantize"}]}


class TestWithPatterns:
    def test_include_replaces_the_star(self) -> None:
        changed = recipe(step(), step(include=["a", "*"], exclude=["b"])).with_patterns(["*x*"], ["op:Conv"])
        assert [s.include for s in changed.steps] == [("*x*",), ("a", "*x*")]
        assert [s.exclude for s in changed.steps] == [("op:Conv",), ("b", "op:Conv")]

    def test_nothing_to_add(self) -> None:
        loaded = Recipe.load("w8a8")
        assert loaded.with_patterns().dump() == loaded.dump()

    def test_keeps_what_was_left_out(self) -> None:
        dumped = recipe(step(act={"dtype": "int8"})).with_patterns(exclude=["a"]).dump()
        assert dumped["steps"] == [step(act={"dtype": "int8"}, exclude=["a"])]

    @pytest.mark.parametrize("key", ["include", "exclude"])
    def test_malformed(self, key: str) -> None:
        with pytest.raises(RecipeError, match=rf"^{key}: pattern 're:\(' is not a regular expression: "):
            recipe(step()).with_patterns(**{key: ["re:("]})


class TestResolve:
    def test_one_step(self) -> None:
        result = resolve(recipe(step(exclude=["*head*", "op:Conv"])), LAYERS)
        assert list(result.configs) == ["q_proj", "down_proj", "a"]
        assert result.skipped == {
            "conv": "excluded by pattern 'op:Conv'",
            "lm_head": "excluded by pattern '*head*'",
        }
        config = result.configs["a"]
        assert (config.weight.per, config.act.range.type, config.rounder.type, config.step) == (
            "channel", "auto", "rtn", 0,
        )  # fmt: skip

    def test_not_included(self) -> None:
        result = resolve(recipe(step(include=["op:MatMul"])), LAYERS)
        assert result.skipped == dict.fromkeys(("conv", "lm_head", "a"), "not included by any step")

    def test_every_name_of_a_layer_counts(self) -> None:
        result = resolve(recipe(step(include=["MatMul_3", "head", "re:conv.w.*"])), LAYERS)
        assert list(result.configs) == ["conv", "down_proj", "lm_head"]

    def test_a_later_step_overrides_the_keys_it_gives(self) -> None:
        result = resolve(
            recipe(
                step(
                    weight={"per": "tensor"},
                    act={"dtype": "int8", "symmetric": True, "range": {"type": "mse"}},
                ),
                step(include=["*_proj"], act={"symmetric": False}),
                step(include=["down_proj"], weight={"per": "channel"}, act={"range": {"type": "minmax"}}),
            ),
            LAYERS,
        )

        def seen(node: str) -> tuple[Any, ...]:
            config = result.configs[node]
            act = config.act
            return config.weight.per, act.dtype, act.symmetric, act.range.type, config.step

        assert seen("conv") == ("tensor", "int8", True, "mse", 0)
        assert seen("q_proj") == ("tensor", "int8", False, "mse", 1)
        assert seen("down_proj") == ("channel", "int8", False, "minmax", 2)

    def test_a_default_written_out_overrides(self) -> None:
        steps = (step(act={"dtype": "int8"}), step(include=["a"], act={"dtype": "auto"}))
        result = resolve(recipe(*steps), LAYERS)
        assert result.configs["conv"].act.dtype == "int8"
        assert result.configs["a"].act.dtype == "auto"

    def test_options_belong_to_their_range(self) -> None:
        first = step(act={"range": {"type": "percentile", "percentile": 99}})
        other = resolve(recipe(first, step(act={"range": {"type": "mse"}})), LAYERS).configs["a"].act.range
        assert (other.type, other.options) == ("mse", {})
        same = (
            resolve(recipe(first, step(act={"range": {"type": "percentile"}})), LAYERS).configs["a"].act.range
        )
        assert same.build() == Percentile(99)

    def test_an_exclude_only_ends_its_own_step(self) -> None:
        result = resolve(
            recipe(step(act={"dtype": "int8"}), step(exclude=["a"], act={"dtype": "uint8"})), LAYERS
        )
        assert (result.configs["a"].act.dtype, result.configs["a"].step) == ("int8", 0)
        late = resolve(recipe(step(exclude=["a"], act={"dtype": "int8"}), step(include=["a"])), LAYERS)
        assert (late.configs["a"].act.dtype, late.configs["a"].step) == ("auto", 1)

    @pytest.mark.parametrize("key", ["include", "exclude"])
    def test_a_pattern_that_matches_nothing(self, key: str) -> None:
        with pytest.raises(RecipeError) as caught:
            resolve(recipe(step(), step(**{key: ["a", "*lm_haed*"]})), LAYERS)
        assert (
            str(caught.value) == f"steps[1].{key}: pattern '*lm_haed*' matches no layer; nearest: 'lm_head'"
        )

    def test_operators_that_are_there(self) -> None:
        with pytest.raises(
            RecipeError, match="'op:Gem' matches no layer; the operators are Conv, Gemm, MatMul"
        ):
            resolve(recipe(step(exclude=["op:Gem"])), LAYERS)

    def test_a_pattern_may_match_what_cannot_be_quantized(self) -> None:
        result = resolve(recipe(step(exclude=["op:LSTM"])), LAYERS, others=[Layer("rnn", "LSTM")])
        assert list(result.configs) == [layer.node for layer in LAYERS]
        assert result.skipped == {}

    def test_no_layers(self) -> None:
        result = resolve(recipe(step()), [])
        assert (result.configs, result.skipped) == ({}, {})
        with pytest.raises(RecipeError, match="the model has no layer that can be quantized"):
            resolve(recipe(step(include=["a"])), [])

    @given(_recipes)
    def test_every_layer_has_a_configuration_or_a_reason(self, data: dict[str, Any]) -> None:
        result = resolve(Recipe.load(data), LAYERS)
        assert sorted([*result.configs, *result.skipped]) == sorted(layer.node for layer in LAYERS)
        assert all(config.step < len(data["steps"]) for config in result.configs.values())
