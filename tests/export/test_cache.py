"""int8 KV caches: the formula, chunks of any length, every form of decoder, what is written about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from calib.errors import CalibrationError, GraphError
from calib.model import open_model
from calib.types import Array, SampleId
from onnxslim_ptq import Result, quantize
from onnxslim_ptq.analysis.compare import compare_models
from onnxslim_ptq.cli import main
from onnxslim_ptq.core.cache import CachePair
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.export.exchange import Exchange
from onnxslim_ptq.exporting import export
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.kv_cache import find_cache
from onnxslim_ptq.recipe import Recipe
from tests import decoders
from tests.decoders import HEADS, SIZE, WIDTH, appending, grouped, merged, stacked
from tests.models import feeds_for, mlp

Make = Callable[[], onnx.ModelProto]
FORMS: list[Any] = [pytest.param(make, id=make.__name__) for make in (appending, merged, grouped, stacked)]
PER = pytest.mark.parametrize("per", ["channel", "token"])


def cached(proto: onnx.ModelProto, per: str, **step: Any) -> Result:
    recipe = {"steps": [{"type": "kv_cache", "per": per, **step}]}
    return quantize(proto, recipe, decoders.feeds(proto), target="generic")


def session(proto: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def codes_past(proto: onnx.ModelProto) -> dict[str, Array]:
    """No tokens yet, as the int8 model takes them."""
    types = {"tensor(int8)": np.int8, "tensor(float)": np.float32}
    return {
        i.name: np.zeros([d if isinstance(d, int) else int(d == "B") for d in i.shape], types[i.type])
        for i in session(proto).get_inputs()
        if i.name.startswith("past")
    }


def in_chunks(proto: onnx.ModelProto, x: Array, lengths: list[int]) -> tuple[Array, dict[str, Array]]:
    """The answers to all tokens, and the cache at the end; each chunk reads the cache the one before left."""
    runs = session(proto)
    names = [o.name for o in runs.get_outputs()]
    inputs = {i.name for i in runs.get_inputs()}
    past, answers, at = codes_past(proto), [], 0
    for length in lengths:
        feed: dict[str, Any] = {"x": x[:, at : at + length], **past}
        at += length
        if "use_cache" in inputs:
            feed["use_cache"] = np.array(True)
        if "seqlens" in inputs:
            feed |= {"seqlens": np.array([at - 1], np.int32), "total": np.array(at, np.int32)}
        found = dict(zip(names, runs.run(None, feed), strict=True))
        answers.append(found["y"])
        past = {name: found[_present(name)] for name in past}
    return np.concatenate(answers, axis=1), past


def _present(past: str) -> str:
    return past.replace("past_key_values", "present").replace("past.", "present.")


def keys_of(x: Array, weights: dict[str, Array], name: str) -> Array:
    """Keys (or values) of all tokens, [1, heads, tokens, channels]."""
    flat = x.astype(np.float32) @ weights[name]
    return flat.reshape(1, -1, HEADS, WIDTH).transpose(0, 2, 1, 3)


def weights_in(proto: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}


class TestFound:
    @pytest.mark.parametrize("make", FORMS)
    def test_every_form(self, make: Make) -> None:
        pairs = find_cache(Graph(open_model(make())))
        if make is stacked:
            assert pairs == [CachePair("past.0", "present.0", 5, 1, 3, 0, "append")]
            assert pairs[0].channels == (0, 2, 4)
            assert pairs[0].row == (2, 4)
            return
        assert [p.past for p in pairs] == ["past_key_values.0.key", "past_key_values.0.value"]
        assert [p.present for p in pairs] == ["present.0.key", "present.0.value"]
        assert [p.append is not None for p in pairs] == [make is appending] * 2
        assert [p.is_key for p in pairs] == [True, False]
        assert all(p.tokens == 2 and p.channels == p.row == (1, 3) for p in pairs)

    def test_names_do_not_matter_where_the_graph_tells(self) -> None:
        proto = onnx.compose.add_prefix(appending(), "any.")
        assert len(find_cache(Graph(open_model(proto)))) == 2

    def test_a_concat_along_another_axis_is_none(self) -> None:
        proto = appending()
        for node in proto.graph.node:
            if node.op_type == "Concat":
                node.attribute[0].i = 3
        renamed = onnx.compose.add_prefix(proto, "any.")
        assert find_cache(Graph(open_model(renamed))) == []


class TestStatic:
    def test_numbers_are_those_of_numpy(self) -> None:
        proto = appending()
        result = cached(proto, "channel")
        samples = [np.asarray(f["x"]) for f in decoders.feeds(proto)]
        held = samples[7::8]  # every 8th measures
        used = [x for x in samples if all(x is not h for h in held)]
        keys = np.concatenate([keys_of(x, weights_in(proto), "wk") for x in used], axis=2)
        expected = np.abs(keys).max(axis=(0, 2), keepdims=True) / 127
        np.testing.assert_allclose(result.plan.io[0].scale, expected, rtol=1e-5)
        x = samples[0]
        _, past = in_chunks(result.model, x, [9])
        want = np.clip(np.rint(keys_of(x, weights_in(proto), "wk") / expected), -128, 127)
        assert past["past_key_values.0.key"].dtype == np.int8
        assert np.abs(past["past_key_values.0.key"] - want).max() <= 1  # float sums round either way
        assert (past["past_key_values.0.key"] == want).mean() > 0.99

    def test_full_range(self) -> None:
        plain, full = (cached(appending(), "channel", full_range=f).plan.io[0].scale for f in (False, True))
        np.testing.assert_allclose(full * 127.5, plain * 127, rtol=1e-6)

    def test_a_dead_channel_keeps_scale_1_and_codes_0(self) -> None:
        proto = appending()
        weight = next(t for t in proto.graph.initializer if t.name == "wk")
        values = onnx.numpy_helper.to_array(weight).copy()
        values[:, 3] = 0
        weight.CopyFrom(onnx.numpy_helper.from_array(values, "wk"))
        result = cached(proto, "channel")
        assert result.plan.io[0].scale[0, 0, 0, 3] == 1
        _, past = in_chunks(result.model, decoders.feeds(proto)[0]["x"], [4, 5])
        assert not past["past_key_values.0.key"][0, 0, :, 3].any()

    def test_nan_in_the_samples_is_an_error(self) -> None:
        proto = appending()
        samples = decoders.feeds(proto)
        samples[0]["x"] = np.full_like(samples[0]["x"], np.nan)
        with pytest.raises(CalibrationError, match=r"present\.0\.key.*NaN"):
            quantize(proto, {"steps": [{"type": "kv_cache"}]}, samples)


class TestPerToken:
    def test_numbers_are_those_of_numpy(self) -> None:
        proto = appending()
        result = cached(proto, "token")
        x = decoders.feeds(proto)[0]["x"]
        _, past = in_chunks(result.model, x, [9])
        keys = keys_of(x, weights_in(proto), "wk")
        scale = np.abs(keys).max(axis=(1, 3), keepdims=True) / 127
        np.testing.assert_allclose(past["past_key_values.0.key_scale"], scale, rtol=1e-5)
        assert past["past_key_values.0.key_scale"].shape == (1, 1, 9, 1)
        want = np.rint(keys / scale)
        assert np.abs(past["past_key_values.0.key"] - want).max() <= 1

    def test_no_data_is_needed(self) -> None:
        assert not Recipe.load({"steps": [{"type": "kv_cache", "per": "token"}]}).needs_ranges
        assert Recipe.load({"steps": [{"type": "kv_cache"}]}).needs_ranges

    def test_smoothed_keys_are_closer_where_channels_differ(self) -> None:
        error = {}
        for factor in (0.0, 1.0):
            result = cached(appending(), "token", smooth_factor=factor)
            error[factor] = result.metrics["per_output"]
        plain, smooth = (error[f]["y"]["sqnr_db"] for f in (0.0, 1.0))
        assert smooth > plain - 1
        assert error[0.0]["present.0.value"] == error[1.0]["present.0.value"]  # keys only

    def test_a_row_of_zeros(self) -> None:
        result = cached(appending(), "token")
        answers, past = in_chunks(result.model, np.zeros((1, 3, SIZE), np.float32), [2, 1])
        assert not past["past_key_values.0.key"].any()
        assert not answers.any()


class TestChunks:
    @PER
    @pytest.mark.parametrize("make", [appending, stacked])
    def test_appended_codes_do_not_depend_on_the_chunks(self, make: Make, per: str) -> None:
        model = cached(make(), per).model
        x = np.random.default_rng(1).standard_normal((1, 24, SIZE)).astype(np.float32)
        (singly, cache), (at_once, whole) = (in_chunks(model, x, lengths) for lengths in ([1] * 24, [24]))
        for name, values in cache.items():
            if name.endswith("_scale"):
                np.testing.assert_allclose(values, whole[name], rtol=1e-6)
            else:
                assert np.abs(values.astype(int) - whole[name]).max() <= 1  # float sums round either way
                assert (values == whole[name]).mean() > 0.99
        np.testing.assert_allclose(singly[:, -1], at_once[:, -1], atol=5e-3)

    @PER
    @pytest.mark.parametrize("make", FORMS)
    def test_written_tokens_are_never_rounded_again(self, make: Make, per: str) -> None:
        model = cached(make(), per).model
        x = np.random.default_rng(2).standard_normal((1, 40, SIZE)).astype(np.float32)
        _, first = in_chunks(model, x, [8])
        _, later = in_chunks(model, x, [8] + [1] * 32)
        for name, before in first.items():
            axis = before.ndim - 2
            after = np.take(later[name], range(8), axis=axis)
            np.testing.assert_array_equal(after, before)

    @PER
    @pytest.mark.parametrize("make", FORMS)
    def test_answers_stay_near_the_float_model(self, make: Make, per: str) -> None:
        proto = make()
        result = cached(proto, per)
        x = np.random.default_rng(3).standard_normal((1, 32, SIZE)).astype(np.float32) / 2
        lengths = [5, 1, 9, 17]
        exact, _ = in_chunks(proto, x, lengths)
        seen, _ = in_chunks(result.model, x, lengths)
        noise = float(((exact - seen) ** 2).sum() / (exact**2).sum())
        assert 0 < noise < 10**-2.5

    @PER
    def test_float16(self, per: str) -> None:
        proto = appending(dtype="float16")
        result = cached(proto, per)
        kinds = {i.name: i.type.tensor_type.elem_type for i in result.model.graph.input}
        assert kinds["past_key_values.0.key"] == onnx.TensorProto.INT8
        assert result.metrics["per_output"]["y"]["sqnr_db"] > 30


class TestWritten:
    @PER
    def test_the_files(self, per: str, tmp_path: Path) -> None:
        proto = appending()
        result = cached(proto, per)
        paths = result.save(tmp_path / "m.onnx")
        assert result.recipe.quant_type == "W16A16_C8"
        entries = {e["name"]: e for e in json.loads(paths.json.read_text())["io_changes"]}
        assert set(entries) == {
            f"{p}.0.{k}" for p in ("past_key_values", "present") for k in ("key", "value")
        }
        key = entries["past_key_values.0.key"]
        assert key["dtype"] == "int8"
        assert key["scale_shape"] == ([1, HEADS, 1, WIDTH] if per == "channel" else [1, 1, 1, 1])
        assert len(key["scale"]) == (SIZE if per == "channel" else 1)
        assert key.get("scale_tensor") == (None if per == "channel" else "past_key_values.0.key_scale")
        onnx.checker.check_model(str(paths.model), full_check=True)

    @PER
    @pytest.mark.parametrize("make", FORMS)
    def test_compare_feeds_both(self, make: Make, per: str) -> None:
        """A float cache with tokens in it: codes for one model, floats for the other."""
        proto = make()
        result = cached(proto, per)
        feed = dict(decoders.feeds(proto)[0])
        tokens = feed["x"].shape[1]
        _, past = in_chunks(proto, feed["x"][:, :6] / 2, [6])
        feed |= {"x": feed["x"] / 2, **past}
        if "seqlens" in feed:
            feed |= {"seqlens": np.array([tokens + 5], np.int32), "total": np.array(tokens + 6, np.int32)}
        found = compare_models(open_model(proto), result.quantized, [(SampleId(0), feed)])
        assert [e.name for e in found.outputs] == [o.name for o in proto.graph.output]
        assert all(e.sqnr is not None and 15 < e.sqnr < 60 for e in found.outputs), found.outputs

    def test_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        proto = appending()
        onnx.save(proto, tmp_path / "f.onnx")
        samples = tmp_path / "samples"
        samples.mkdir()
        for i, feed in enumerate(decoders.feeds(proto)):
            np.savez(samples / f"{i:02}.npz", **feed)
        (tmp_path / "c8.yaml").write_text("steps: [{type: kv_cache, per: token}]")
        quantized = ["quantize", str(tmp_path / "f.onnx"), str(tmp_path / "q.onnx"), "--calib", str(samples)]
        for more in (["--dry-run"], []):
            assert main([*quantized, "--recipe", str(tmp_path / "c8.yaml"), *more]) == 0
            told = capsys.readouterr().out
            assert "KV cache: 2 inputs and as many outputs are int8, per token" in told
            assert "exit code 2" not in told
        arguments = ["compare", str(tmp_path / "f.onnx"), str(tmp_path / "q.onnx"), "--calib", str(samples)]
        assert main([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["per_output"]["present.0.key"]["sqnr_db"] > 30

    @PER
    def test_export_keeps_the_cache(self, per: str, tmp_path: Path) -> None:
        recipe = {"steps": [{"type": "quantize"}, {"type": "kv_cache", "per": per}]}
        result = quantize(appending(), recipe, decoders.feeds(appending()))
        before = result.save(tmp_path / "q.onnx")
        shapes = {f"past_key_values.0.{kind}": (1, HEADS, 3, WIDTH) for kind in ("key", "value")}
        shapes |= {f"past_key_values.0.{kind}_scale": (1, 1, 3, 1) for kind in ("key", "value")}
        known = {i.name for i in result.model.graph.input}
        shapes = {name: shape for name, shape in shapes.items() if name in known}
        made = export(before.model, tmp_path / "e.onnx", "generic", shapes={"x": (1, 4, SIZE), **shapes})
        entries = [json.loads(p.read_text())["io_changes"] for p in (before.json, made.paths.json)]
        told = [{e["name"]: e for e in found} for found in entries]
        assert told[0].keys() == told[1].keys()
        for name, entry in told[0].items():
            assert entry["dtype"] == told[1][name]["dtype"]
            assert entry.get("scale_tensor") == told[1][name].get("scale_tensor")
            np.testing.assert_allclose(entry["scale"], told[1][name]["scale"], rtol=1e-6)
        assert Exchange.of(open_model(made.paths.model)).caches.keys() == told[0].keys()

    def test_with_quantized_layers(self) -> None:
        proto = appending()
        recipe = {"steps": [{"type": "quantize"}, {"type": "kv_cache"}]}
        result = quantize(proto, recipe, decoders.feeds(proto))
        assert result.recipe.quant_type == "W8A8_C8"
        assert len(result.plan.io) == 2
        assert len(result.plan.weights) == 4
        assert result.metrics["sqnr_db"] > 20

    def test_metadata_that_is_not_ours(self) -> None:
        model = cached(appending(), "token").quantized
        model.proto.metadata_props[0].value = '{"past": 1}'
        with pytest.raises(GraphError, match="cannot be read"):
            Exchange.of(model)

    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": "object"},
            {"float": "int64"},
            {"row": [9]},
            {"token_scale": "nowhere"},
            {"scale": "nowhere"},
            {"row": None},
        ],
    )
    def test_damaged_metadata(self, change: dict[str, Any]) -> None:
        model = cached(appending(), "token").quantized
        told = json.loads(model.proto.metadata_props[0].value)
        told["past_key_values.0.key"] |= change
        model.proto.metadata_props[0].value = json.dumps(told)
        with pytest.raises(GraphError, match="cannot be read"):
            Exchange.of(model)


class TestRefused:
    def test_a_model_without_a_cache(self) -> None:
        with pytest.raises(GraphError, match="has no KV cache"):
            quantize(mlp(), {"steps": [{"type": "quantize"}, {"type": "kv_cache"}]}, feeds_for(mlp(), 9))

    def test_a_target_without_one(self) -> None:
        with pytest.raises(RecipeError, match="not available for target 'ascend'"):
            quantize(
                appending(), {"steps": [{"type": "kv_cache"}]}, decoders.feeds(appending()), target="ascend"
            )

    def test_a_pattern_that_matches_nothing(self) -> None:
        with pytest.raises(RecipeError, match=r"'\*\.7\.\*' matches no cache; layers are named like: 'past"):
            cached(appending(), "token", include=["*.7.*"])

    def test_patterns(self) -> None:
        result = cached(appending(), "token", exclude=["*.value"])
        assert [c.pair.past for c in result.plan.io] == ["past_key_values.0.key"]

    @pytest.mark.parametrize(
        ("step", "text"),
        [
            ({"per": "tensor"}, r"steps\[0\].per: got 'tensor'; use channel, token"),
            ({"dtype": "int4"}, r"steps\[0\].dtype"),
            ({"smooth_factor": 1}, r"steps\[0\].smooth_factor: every channel"),
            ({"per": "token", "full_range": True}, r"steps\[0\].full_range"),
            ({"smoth_factor": 1}, r"unknown key \(did you mean 'smooth_factor'\?\)"),
        ],
    )
    def test_bad_steps(self, step: dict[str, Any], text: str) -> None:
        with pytest.raises(RecipeError, match=text):
            Recipe.load({"steps": [{"type": "kv_cache", **step}]})

    def test_smoothing_where_no_cache_holds_keys_alone(self) -> None:
        with pytest.raises(RecipeError, match=r"smooth_factor is about keys, .* \('past\.0'\); leave it out"):
            cached(stacked(), "token", smooth_factor=1.0)


@pytest.mark.parametrize(
    ("past", "is_key"),
    [
        ("past_key_values.3.key", True),
        ("past_key_values.3.value", False),
        ("past_key_values.0.decoder.key", True),
        ("past_key_0", True),
        ("past_value_0", False),
        ("past.1.k", True),
        ("past_v.1", False),
        ("past_key_values.0", False),
        ("monkey.0", False),
    ],
)
def test_keys_are_known_by_name(past: str, is_key: bool) -> None:
    assert CachePair(past, "present", 4, 0, 2).is_key is is_key
