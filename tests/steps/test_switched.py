"""One set of integer weights, two ways to quantize activations: by the time step, and by the number of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from calib.errors import CalibrationError
from calib.model import open_model
from onnxslim_ptq import Result, quantize
from onnxslim_ptq.asked import Asked
from onnxslim_ptq.core.targets import TARGETS
from onnxslim_ptq.errors import GraphError, RecipeError
from onnxslim_ptq.export.files import write_model
from onnxslim_ptq.export.rebuild import rebuild
from onnxslim_ptq.export.weight_files import WeightFiles
from onnxslim_ptq.samples import measured_samples
from tests.models import outputs_of, parse, quantized, sqnr_of, weights_of

WEIGHTS = weights_of(6, w1=(32, 64), b1=(64,), w2=(64, 16))
BODY = """g (float[N,T,32] x) => (float[N,T,16] y) {
    [up] h = MatMul (x, w1) [bias] a = Add (h, b1) [act] r = Relu (a) [down] y = MatMul (r, w2) }"""
RANGE = {"range": {"type": "minmax"}}
STEPS = (0, 5, 10, 15)


def model() -> onnx.ModelProto:
    return parse(BODY, WEIGHTS, 17, 8)


def recipe(when: str, **act: Any) -> dict[str, Any]:
    per = "tensor" if when == "static" else "token"
    ranges = {} if when == "dynamic" else RANGE
    step = {"type": "quantize", "bias_correction": False, "act": {"per": per, "when": when, **ranges, **act}}
    return {"steps": [step]}


def feeds(per_step: int = 3, tokens: int = 6) -> list[dict[str, Any]]:
    """Samples whose size shrinks with the time step, as noise does."""
    draw = np.random.default_rng(2)
    return [
        {
            "x": (draw.normal(size=(2, tokens, 32)) * (1 + step / 5)).astype(np.float32),
            "timestep_idx": np.array(step),
        }
        for step in STEPS
        for _ in range(per_step)
    ]


def plain(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"x": feed["x"]} for feed in data]


def at(step: int, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"x": feed["x"], "timestep_idx": np.array(step, np.int64)} for feed in data]


def timestep(sep: int = 10, **options: Any) -> Result:
    data = feeds()
    return quantize(model(), recipe("timestep", timestep_sep=sep, **options), data, eval_data=data)


class TestTimestep:
    def test_below_the_threshold_it_is_the_dynamic_model(self) -> None:
        data = feeds()
        dynamic = quantize(model(), recipe("dynamic"), plain(data), eval_data=plain(data)).model
        seen = outputs_of(timestep().model, at(9, data))
        assert sqnr_of(outputs_of(dynamic, plain(data)), seen) > 100

    @pytest.mark.parametrize(("steps", "reached"), [((10, 11, 14), 10), ((15, 16, 99), 15)])
    def test_from_the_threshold_on_it_is_the_static_model_of_the_step_reached(
        self, steps: tuple[int, ...], reached: int
    ) -> None:
        data = feeds()
        late = [{"x": feed["x"]} for feed in data if feed["timestep_idx"] >= reached]
        result = quantize(model(), recipe("static"), late * 2, eval_data=late)
        for step in steps:
            seen = outputs_of(timestep().model, at(step, data))
            assert sqnr_of(outputs_of(result.model, plain(data)), seen) > 60

    def test_layers_may_have_thresholds_of_their_own(self, tmp_path: Path) -> None:
        """Each follows its own; the weight files have room for one."""
        steps = recipe("timestep", timestep_sep=5)["steps"]
        later = recipe("timestep", timestep_sep=15)["steps"][0]
        steps.append({**later, "include": ["down"]})
        data = feeds()
        both = quantize(model(), {"steps": steps}, data, eval_data=data)
        early, late = (timestep(sep).model for sep in (5, 15))
        assert sqnr_of(outputs_of(early, at(15, data)), outputs_of(both.model, at(15, data))) > 100
        assert sqnr_of(outputs_of(late, at(4, data)), outputs_of(both.model, at(4, data))) > 100
        assert sqnr_of(outputs_of(early, at(7, data)), outputs_of(both.model, at(7, data))) < 60
        with pytest.raises(GraphError, match=r"timestep_sep is 5, 15 in .* these files have room for one"):
            both.save(tmp_path / "m.onnx", weights=WeightFiles())

    def test_the_weights_are_there_once_and_stay_integer(self) -> None:
        proto = timestep().model
        integers = [
            t.name
            for t in proto.graph.initializer
            if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2
        ]
        assert len(integers) == 2
        assert [n.op_type for n in proto.graph.node].count("MatMul") == 2
        extra = next(i for i in proto.graph.input if i.name == "timestep_idx")
        assert (extra.type.tensor_type.elem_type, len(extra.type.tensor_type.shape.dim)) == (
            onnx.TensorProto.INT64,
            0,
        )

    @pytest.mark.parametrize("method", ["minmax", "mean_minmax", "histogram"])
    def test_numbers_of_a_step_are_those_of_it_and_all_higher_steps(self, method: str) -> None:
        result = timestep(range={"type": method})
        table = next(found for key, found in result.plan.timesteps.items() if key.startswith("x@"))
        assert list(table) == list(STEPS)
        scales = [float(table[step].scale) for step in STEPS]
        data = feeds()
        if method == "minmax":
            want = [max(np.abs(f["x"]).max() for f in data if f["timestep_idx"] >= s) for s in STEPS]
            assert all(0 < s * 255 / 2 <= w * 1.001 for s, w in zip(scales, want, strict=True))
        if method == "mean_minmax":
            for step, scale in zip(STEPS, scales, strict=True):
                later = [f["x"] for f in data if f["timestep_idx"] >= step]
                width = np.mean([x.max() for x in later]) - np.mean([x.min() for x in later])
                assert scale == pytest.approx(width / 255, rel=1e-5)
            assert scales == sorted(scales)  # the lower steps, which are smaller, join one after another

    def test_files_hold_a_row_per_step(self, tmp_path: Path) -> None:
        result = timestep()
        result.save(tmp_path / "m.onnx", weights=WeightFiles())
        tensors = load_file(tmp_path / "quant_model_weight_w8a8_timestep.safetensors")
        kinds = json.loads((tmp_path / "quant_model_description_w8a8_timestep.json").read_text())
        assert kinds["model_quant_type"] == kinds["up.deq_scale"] == "W8A8_TIMESTEP"
        shapes = {
            part: tensors[f"up.{part}"].shape
            for part in ("input_scale", "input_offset", "quant_bias", "deq_scale")
        }
        assert shapes == {
            "input_scale": (4, 1),
            "input_offset": (4, 1),
            "quant_bias": (4, 64),
            "deq_scale": (4, 64),
        }
        assert tensors["up.weight"].shape == (64, 32)
        table = next(found for key, found in result.plan.timesteps.items() if key.startswith("x@"))
        np.testing.assert_allclose(
            tensors["up.input_scale"][:, 0], [p.scale for p in table.values()], rtol=1e-6
        )
        deq = tensors["up.input_scale"] * tensors["up.weight_scale"].T
        np.testing.assert_array_equal(tensors["up.deq_scale"], deq.view(np.int32).astype(np.int64))
        paths = json.loads((tmp_path / "m.json").read_text())
        told = next(a for name, a in paths["activations"].items() if name == "x")["timesteps"]
        assert told["steps"] == list(STEPS)
        assert told["scale"] == pytest.approx(tensors["up.input_scale"][:, 0].tolist(), rel=1e-6)

    def test_the_files_rebuild_the_switching_graph(self, tmp_path: Path) -> None:
        """The threshold and the steps of the rows are in the metadata of the tensors' file."""
        result, data = timestep(), feeds()
        result.save(tmp_path / "m.onnx", weights=WeightFiles(part_bytes=4000))
        description = tmp_path / "quant_model_description_w8a8_timestep.json"
        write_model(rebuild(open_model(model()), description, TARGETS["cpu"]), tmp_path / "again.onnx")
        again = onnx.load(tmp_path / "again.onnx")
        for step in (0, 9, 10, 14, 15, 20):
            np.testing.assert_array_equal(
                outputs_of(result.model, at(step, data)), outputs_of(again, at(step, data))
            )

    @pytest.mark.parametrize(
        ("metadata", "says"),
        [
            (
                None,
                "'up' has the kind W8A8_TIMESTEP: its files do not tell from which time step it is static",
            ),
            ("[]", "is damaged: metadata 'onnxslim_ptq.timesteps' holds no static_from and rows"),
            ('{"static_from": 7, "rows": [0, 5, 10, 15]}', "is damaged: time steps are not ascending"),
            ('{"static_from": 0, "rows": [0, true]}', "is damaged: time steps are not ascending"),
            (
                '{"static_from": 0, "rows": [0, 5]}',
                r"'up.input_scale' has shape \[4, 1\], not 2 finite numbers",
            ),
        ],
    )
    def test_files_that_do_not_tell_their_steps(
        self, metadata: str | None, says: str, tmp_path: Path
    ) -> None:
        timestep().save(tmp_path / "m.onnx", weights=WeightFiles())
        path = tmp_path / "quant_model_weight_w8a8_timestep.safetensors"
        tensors = load_file(path)
        path.unlink()
        save_file(tensors, path, None if metadata is None else {"onnxslim_ptq.timesteps": metadata})
        description = tmp_path / "quant_model_description_w8a8_timestep.json"
        with pytest.raises(GraphError, match=says):
            rebuild(open_model(model()), description, TARGETS["cpu"])

    @pytest.mark.parametrize(
        ("form", "dtype", "shape"), [("int64", np.int64, ()), ("int32[1]", np.int32, (1,))]
    )
    def test_a_model_that_has_the_input_itself(self, form: str, dtype: type, shape: tuple[int, ...]) -> None:
        """The same codes as of the model that gets the input, whatever its type."""
        own = BODY.replace("x) =>", f"x, {form} timestep_idx) =>").replace(
            "[up] h = MatMul (x, w1)",
            "[as] t = Cast <to = 1> (timestep_idx) [no] z = Sub (t, t) [and] s = Add (x, z) [up] h = MatMul (s, w1)",
        )
        data = [{**f, "timestep_idx": f["timestep_idx"].astype(dtype).reshape(shape)} for f in feeds()]
        result = quantize(
            parse(own, WEIGHTS, 17, 8), recipe("timestep", timestep_sep=10), data, eval_data=data
        )
        plain = timestep().model
        for step in (5, 10, 14, 15):
            fed = at(step, feeds())
            given = [{**f, "timestep_idx": np.full(shape, step, dtype)} for f in fed]
            np.testing.assert_array_equal(outputs_of(result.model, given), outputs_of(plain, fed))

    def test_a_sample_without_its_step(self) -> None:
        data = [*feeds(1)[:3], *plain(feeds(1))]
        with pytest.raises(CalibrationError, match="sample 3: has no timestep_idx; add it to every sample"):
            quantize(model(), recipe("timestep", timestep_sep=10), data, eval_data=data)

    def test_a_threshold_nobody_saw(self) -> None:
        with pytest.raises(
            CalibrationError,
            match=r"no sample has timestep_idx 7, the first static one; the samples have 0, 5, 10, 15",
        ):
            timestep(7)

    def test_compare_measures_on_what_quantize_does(self) -> None:
        """Nothing is held out when every sample is the only one of its step."""
        data = [{**feed, "timestep_idx": np.array(step)} for step, feed in enumerate(feeds())]
        asked = Asked(recipe("timestep", timestep_sep=10), data)
        result = quantize(model(), asked.recipe, data)
        _, measured_on = measured_samples(open_model(model()), result.recipe, asked)
        assert measured_on == result.metrics["measured_on"] == "calibration"


class TestPrefill:
    def test_several_tokens_are_dynamic_and_one_is_static(self) -> None:
        data = plain(feeds())
        result = quantized(model(), data, recipe=recipe("prefill"))
        single = [{"x": feed["x"][:, :1]} for feed in data]
        for kind, shown in (("dynamic", data), ("static", single)):
            other = quantize(model(), recipe(kind), data, eval_data=data[7::8])
            assert sqnr_of(outputs_of(other.model, shown), outputs_of(result.model, shown)) > 55
        assert [i.name for i in result.model.graph.input] == ["x"]

    def test_the_ready_recipe_and_its_files(self, tmp_path: Path) -> None:
        result = quantized(model(), plain(feeds()), recipe="w8a8-pdmix")
        paths = result.save(tmp_path / "m.onnx", weights=WeightFiles())
        assert {a["when"] for a in json.loads(paths.json.read_text())["activations"].values()} == {"prefill"}
        description = tmp_path / "quant_model_description_w8a8_mix.json"
        assert json.loads(description.read_text())["up.deq_scale"] == "W8A8_MIX"
        write_model(rebuild(open_model(model()), description, TARGETS["cpu"]), tmp_path / "again.onnx")
        for shown in (plain(feeds()), [{"x": feed["x"][:, :1]} for feed in feeds()]):
            again = outputs_of(onnx.load(tmp_path / "again.onnx"), shown)
            assert sqnr_of(outputs_of(result.model, shown), again) > 90


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (
            {"per": "token", "when": "timestep", **RANGE},
            "act.timestep_sep: when: timestep and timestep_sep belong",
        ),
        (
            {"per": "token", "when": "prefill", "timestep_sep": 3, **RANGE},
            "act.timestep_sep: when: timestep and",
        ),
        (
            {"per": "token", "when": "prefill"},
            "act.range: 'auto' serves static activations only; name a method",
        ),
        (
            {"per": "tensor", "when": "prefill", **RANGE},
            "act.when: per: token and when: dynamic belong together",
        ),
        ({"per": "token", "when": "timestep", "timestep_sep": -1, **RANGE}, "act.timestep_sep: "),
    ],
)
def test_refused(act: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        quantize(model(), {"steps": [{"type": "quantize", "act": act}]}, plain(feeds()))
