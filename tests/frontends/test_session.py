"""Sessions: the document's examples, what they become, and every limit it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from onnxslim_ptq.cli import main
from onnxslim_ptq.errors import GraphError, RecipeError, VerificationError
from onnxslim_ptq.frontends.session import (
    FA3ProcessorConfig,
    M3ProcessorConfig,
    M4ProcessorConfig,
    M6Config,
    M6ProcessorConfig,
    SaveProcessorConfig,
    SessionConfig,
    TimestepManager,
    W8A8DynamicProcessorConfig,
    W8A8DynamicQuantConfig,
    W8A8ProcessorConfig,
    W8A8QuantConfig,
    W8A8TimeStepProcessorConfig,
    W8A8TimeStepQuantConfig,
    quant_model,
)
from onnxslim_ptq.frontends.session.config import ACT_METHODS
from tests.models import parse, weights_of

SIZES = {f"b.{b}.{n}.weight": (32, 32) for b in (0, 1) for n in ("to_q", "to_k", "to_v", "to_out")}
SIZES |= {f"b.{b}.fc1.weight": (32, 64) for b in (0, 1)} | {f"b.{b}.fc2.weight": (64, 32) for b in (0, 1)}
NORMS = {f"b.{b}.norm{i}.{part}": (32,) for b in (0, 1) for i in (1, 2) for part in ("weight", "bias")}
BLOCK = """
  n1_0 = LayerNormalization (x_0, "b.0.norm1.weight", "b.0.norm1.bias")
  q_0 = MatMul (n1_0, "b.0.to_q.weight")  k_0 = MatMul (n1_0, "b.0.to_k.weight")
  v_0 = MatMul (n1_0, "b.0.to_v.weight")  t_0 = Transpose <perm = [0, 2, 1]> (k_0)  s_0 = MatMul (q_0, t_0)
  p_0 = Softmax <axis = -1> (s_0)  c_0 = MatMul (p_0, v_0)  o_0 = MatMul (c_0, "b.0.to_out.weight")
  a_0 = Add (x_0, o_0)  n2_0 = LayerNormalization (a_0, "b.0.norm2.weight", "b.0.norm2.bias")
  f_0 = MatMul (n2_0, "b.0.fc1.weight")  r_0 = Relu (f_0)  g_0 = MatMul (r_0, "b.0.fc2.weight")
  x_1 = Add (a_0, g_0)
"""


def model() -> onnx.ModelProto:
    """A Conv and two transformer blocks; names as torch exports them."""
    weights: dict[str, Any] = weights_of(4, **SIZES, **NORMS, conv=(32, 3, 4, 4))
    for name in NORMS:
        weights[name] = weights[name] + (1 if name.endswith("weight") else 0)
    weights["b.0.norm1.weight"][::8] *= 12  # channels that one scale does not suit
    names = {name: f"w{i}" for i, name in enumerate(weights)}
    body = BLOCK + BLOCK.replace("_1 =", "_2 =").replace("_0", "_1").replace("b.0.", "b.1.")
    for name, short in names.items():
        body = body.replace(f'"{name}"', short)
    text = f"""g (float[N,3,16,16] image) => (float[N,16,32] y) {{
      e = Conv <strides = [4, 4]> (image, {names["conv"]})  h = Reshape (e, shape)
      x_0 = Transpose <perm = [0, 2, 1]> (h) {body} y = Identity (x_2) }}"""
    proto = parse(text, {"shape": np.array([0, 32, 16])}, 17, 8)
    for node in proto.graph.node:
        node.input[:] = [next((n for n, s in names.items() if s == i), i) for i in node.input]
        node.name = node.name or f"{node.op_type}_{node.output[0]}"
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return proto


def samples(count: int = 8) -> list[Any]:
    draw = np.random.default_rng(0)
    return [[draw.normal(size=(2, 3, 16, 16)).astype(np.float32)] for _ in range(count)]


def dynamic(*names: str) -> W8A8DynamicProcessorConfig:
    return W8A8DynamicProcessorConfig(cfg=W8A8DynamicQuantConfig(act_method="minmax"), disable_names=[*names])


def static(*names: str, act_method: str = "minmax") -> W8A8ProcessorConfig:
    return W8A8ProcessorConfig(cfg=W8A8QuantConfig(act_method=act_method), disable_names=[*names])


def session(**processors: Any) -> SessionConfig:
    return SessionConfig(processor_cfg_map=processors, calib_data=samples())


class TestDocument:
    """The examples as the document has them; paths, data and, where no NPU is, the device are this machine's."""

    def test_session(self, tmp_path: Path) -> None:
        session_config = SessionConfig(
            processor_cfg_map={
                "w8a8": W8A8ProcessorConfig(
                    cfg=W8A8QuantConfig(
                        act_method='minmax'
                    ),
                    disable_names=[]
                ),
                "save": SaveProcessorConfig(
                    output_path=str(tmp_path),
                    safetensors_name=None,
                    json_name=None,
                    save_type=['safe_tensor'],
                    part_file_size=None
                )
            },
            calib_data=samples(),
            device="cpu"
        )  # fmt: skip
        quant_model(model(), session_config)
        names = {path.name for path in tmp_path.iterdir()}
        assert names >= {
            "model_w8a8.onnx", "quant_model_weight_w8a8.safetensors", "quant_model_description_w8a8.json"
        }  # fmt: skip
        seen = ort.InferenceSession(tmp_path / "model_w8a8.onnx").run(None, {"image": samples()[0][0]})
        assert np.isfinite(seen[0]).all()
        tensors = load_file(tmp_path / "quant_model_weight_w8a8.safetensors")
        kinds = json.loads((tmp_path / "quant_model_description_w8a8.json").read_text())
        assert kinds["b.0.to_q.weight"] == "W8A8"
        assert tensors["b.0.to_q.deq_scale"].dtype == np.int64
        assert kinds["b.1.fc2.weight"] == "FLOAT"  # the last linear

    def test_classes(self) -> None:
        w8a8_processor_cfg = W8A8ProcessorConfig(cfg=W8A8QuantConfig(act_method="minmax"), disable_names=[])
        w8a8dynamic_processor_cfg = W8A8DynamicProcessorConfig(
            cfg=W8A8DynamicQuantConfig(act_method="minmax"), disable_names=[]
        )
        w8a8timestep_processor_cfg = W8A8TimeStepProcessorConfig(
            cfg=W8A8TimeStepQuantConfig(act_method="minmax"), disable_names=[], timestep_sep=25
        )
        m6_processor_cfg = M6ProcessorConfig(cfg=M6Config(alpha=0.8, beta=0.2))
        save_processor_cfg = SaveProcessorConfig(
            output_path="./",
            safetensors_name=None,
            json_name=None,
            save_type=["safe_tensor"],
            part_file_size=None,
        )
        assert w8a8_processor_cfg.cfg.act_method == w8a8dynamic_processor_cfg.cfg.act_method == "minmax"
        assert w8a8timestep_processor_cfg.timestep_sep == 25
        assert (m6_processor_cfg.cfg.alpha, m6_processor_cfg.cfg.beta) == (0.8, 0.2)
        assert save_processor_cfg.save_type == ["safe_tensor"]
        for made in (FA3ProcessorConfig(), M3ProcessorConfig(), M4ProcessorConfig()):
            assert made.model_dump() == {}

    def test_defaults(self) -> None:
        assert SessionConfig().model_dump() == {"processor_cfg_map": {}, "calib_data": None, "device": "cpu"}
        assert W8A8QuantConfig().act_method == "minmax"
        assert SaveProcessorConfig(output_path="x").model_dump() == {
            "output_path": "x", "safetensors_name": None, "json_name": None,
            "save_type": ["safe_tensor"], "part_file_size": None,
        }  # fmt: skip
        assert M6Config().model_dump() == {"alpha": None, "beta": None}


class TestProcessors:
    @pytest.mark.parametrize("smoothing", ["m3", "m4", "m6", "m6-given"])
    def test_outliers_are_suppressed(self, smoothing: str) -> None:
        configs = {
            "m3": M3ProcessorConfig(),
            "m4": M4ProcessorConfig(),
            "m6": M6ProcessorConfig(cfg=M6Config()),
            "m6-given": M6ProcessorConfig(cfg=M6Config(alpha=0.8, beta=0.2)),
        }
        result = quant_model(model(), session(w8a8=static(), **{smoothing[:2]: configs[smoothing]}))
        done = {(entry["step"], entry["kind"]) for entry in result.context.smoothing}
        step = {"m3": "awq", "m4": "iter_smooth", "m6": "flex_smooth"}[smoothing[:2]]
        kinds = {"norm-linear"} if smoothing == "m3" else {"norm-linear", "ov"}
        assert done == {(step, kind) for kind in kinds}

    def test_fa3(self, tmp_path: Path) -> None:
        save = SaveProcessorConfig(output_path=str(tmp_path))
        result = quant_model(model(), session(w8a8_dynamic=dynamic(), fa3=FA3ProcessorConfig(), save=save))
        assert len(result.plan.attention) == 6  # queries, keys and values of two blocks
        document = json.loads((tmp_path / "quant_model_description_w8a8_dynamic.json").read_text())
        assert document["fa_quant_type"] == "FAQuant"

    def test_timestep(self, tmp_path: Path) -> None:
        data = [{"timestep_idx": i % 4, "args": sample} for i, sample in enumerate(samples(16))]
        scheme = W8A8TimeStepProcessorConfig(cfg=W8A8TimeStepQuantConfig(), disable_names=[], timestep_sep=2)
        save = SaveProcessorConfig(output_path=str(tmp_path))
        config = SessionConfig(processor_cfg_map={"w8a8_timestep": scheme, "save": save}, calib_data=data)
        quant_model(model(), config)
        tensors = load_file(tmp_path / "quant_model_weight_w8a8_timestep.safetensors")
        assert tensors["b.0.to_q.input_scale"].shape == (4, 1)
        run = ort.InferenceSession(tmp_path / "model_w8a8_timestep.onnx").run
        seen = []
        for step in (0, 1, 2, 3):
            TimestepManager.set_timestep_idx(step)
            seen.append(run(None, TimestepManager.feed({"image": samples()[0][0]}))[0])
        assert np.array_equal(seen[0], seen[1])
        assert not np.array_equal(seen[1], seen[2])
        assert not np.array_equal(seen[2], seen[3])  # each static step has numbers of its own

    def test_every_step_calibrates(self, tmp_path: Path) -> None:
        """One sample a step: none can be held out, the files have a row for each, and any step may be the threshold."""
        data = [{"timestep_idx": i, "args": sample} for i, sample in enumerate(samples(8))]
        scheme = W8A8TimeStepProcessorConfig(cfg=W8A8TimeStepQuantConfig(), disable_names=[], timestep_sep=7)
        save = SaveProcessorConfig(output_path=str(tmp_path))
        config = SessionConfig(processor_cfg_map={"w8a8_timestep": scheme, "save": save}, calib_data=data)
        result = quant_model(model(), config)
        assert result.metrics["measured_on"] == "calibration"
        tensors = load_file(tmp_path / "quant_model_weight_w8a8_timestep.safetensors")
        assert tensors["b.0.to_q.input_scale"].shape == (8, 1)

    @pytest.mark.parametrize("step", [-1, 2.5, "3", True, None])
    def test_a_step_is_a_whole_number(self, step: Any) -> None:
        with pytest.raises(ValueError, match="timestep_idx: expected a whole number of at least 0"):
            TimestepManager.set_timestep_idx(step)

    def test_a_group_with_a_disabled_layer_is_left_alone(self) -> None:
        result = quant_model(model(), session(w8a8=static("b.0.to_q"), m4=M4ProcessorConfig()))
        assert "b.0.to_q.weight" not in {c.name for c in result.plan.weight_codes.values()}
        touched = {node for entry in result.context.smoothing for node in entry["group"]}
        assert "MatMul_k_0" not in touched
        assert "MatMul_k_1" in touched

    @pytest.mark.parametrize("method", ACT_METHODS)
    def test_ranges(self, method: str) -> None:
        result = quant_model(model(), session(w8a8=static(act_method=method)))
        assert {name for _, name in result.plan.ranges.values()} == {ACT_METHODS[method]}

    def test_minmax_is_the_mean_of_the_samples_extremes(self) -> None:
        data = samples()
        result = quant_model(
            model(), SessionConfig(processor_cfg_map={"w8a8": static()}, calib_data=data), quantize_conv=True
        )
        held_out = 1  # of eight samples, the last measures
        lows = [np.min(sample[0]) for sample in data[: len(data) - held_out]]
        rng = next(found for key, (found, _) in result.plan.ranges.items() if key.startswith("image"))
        assert float(rng.lo) == pytest.approx(np.mean(lows, dtype=np.float64), rel=1e-6)

    def test_dynamic_needs_no_data_and_measures_on_what_it_gets(self) -> None:
        result = quant_model(model(), SessionConfig(processor_cfg_map={"w8a8_dynamic": dynamic("b.1.*")}))
        assert result.recipe.quant_type == "W8A8_DYNAMIC"
        assert result.skipped["MatMul_q_1"] == "excluded by pattern 'b.1.*'"

    def test_convolutions_and_the_last_linear_stay_float_unless_asked(self) -> None:
        usual = quant_model(model(), session(w8a8=static())).skipped
        assert "excluded" in usual["Conv_e"]
        assert "excluded" in usual["MatMul_g_1"]
        asked = quant_model(
            model(), session(w8a8=static()), quantize_conv=True, disable_last_linear=False
        ).skipped
        assert not {"Conv_e", "MatMul_g_1"} & set(asked)

    def test_samples_may_be_mappings_or_tensors(self) -> None:
        class Tensor:
            """What torch offers of itself."""

            dtype = "torch.float32"

            def __init__(self, values: Any) -> None:
                self.values = values

            def detach(self) -> Tensor:
                return self

            cpu = detach

            def numpy(self) -> Any:
                return self.values

        forms: list[Any] = [{"image": Tensor(s[0])} for s in samples(4)] + [
            (Tensor(s[0]),) for s in samples(4)
        ]
        config = SessionConfig(processor_cfg_map={"w8a8": static()}, calib_data=forms)
        assert quant_model(model(), config).metrics["sqnr_db"] > 10

    def test_modules_may_be_named_by_the_caller(self) -> None:
        config = session(w8a8=static("decoder"))
        assert "MatMul_q_0" in quant_model(model(), config, names={"MatMul_q_0": "decoder"}).skipped


class TestLimits:
    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: M6Config(alpha=2.0), "M6Config: alpha: expected a number from 0 to 1, got 2.0"),
            (lambda: M6Config(beta=-0.1), "M6Config: beta: expected a number from 0 to 1"),
            (lambda: SessionConfig(device="gpu"), "SessionConfig: device: got 'gpu'; use 'cpu' or 'npu'"),
            (lambda: W8A8QuantConfig(act_method="min"), "W8A8QuantConfig: act_method: 'min' is unknown"),
            (lambda: W8A8ProcessorConfig(disable_names=[]), "W8A8ProcessorConfig: cfg: is required"),
            (lambda: W8A8ProcessorConfig(cfg=W8A8QuantConfig()), "disable_names: is required"),
            (lambda: static("re:("), r"disable_names.0: pattern 're:\(' is not a regular expression"),
            (lambda: M4ProcessorConfig(alpha=1), "M4ProcessorConfig: alpha: unknown field; accepted: none"),
            (lambda: SaveProcessorConfig(output_path="x", save_type=["pth"]), "save_type.0: 'pth' is unknown; use"),
            (lambda: SaveProcessorConfig(output_path="x", part_file_size=0), "part_file_size: input should be greater"),
            (lambda: SessionConfig(processor_cfg_map={"w4a4": M4ProcessorConfig()}), "'w4a4' is unknown; use m3, m4"),
            (lambda: SessionConfig(processor_cfg_map={"w8a8": M4ProcessorConfig()}), "'w8a8' takes a W8A8Proc"),
            (lambda: W8A8TimeStepProcessorConfig(cfg=W8A8TimeStepQuantConfig(), disable_names=[], timestep_sep=-1),
             "timestep_sep: input should be greater than or equal to 0, got -1"),
        ],
    )  # fmt: skip
    def test_fields(self, make: Any, says: str) -> None:
        with pytest.raises(RecipeError, match=says) as caught:
            make()
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("processors", "data", "says"),
        [
            ({"save": SaveProcessorConfig(output_path="x")}, True, "holds only save; it needs one of w8a8, "),
            ({}, True, "holds nothing; it needs one of"),
            ({"m4": M4ProcessorConfig()}, True, "holds only m4"),
            (
                {"fa3": FA3ProcessorConfig(), "w8a8": static()},
                True,
                "fa3 goes with w8a8_dynamic, not with w8a8",
            ),
            ({"w8a8": static()}, False, "calib_data: 'w8a8' needs calibration samples"),
            (
                {"m4": M4ProcessorConfig(), "w8a8_dynamic": dynamic()},
                False,
                "calib_data: 'm4' needs calibration",
            ),
            (
                {"w8a8": static(), "w8a8_dynamic": dynamic()},
                True,
                "w8a8 and w8a8_dynamic both quantize; keep one",
            ),
            (
                {"m3": M3ProcessorConfig(), "m4": M4ProcessorConfig(), "w8a8": static()},
                True,
                "both suppress outliers",
            ),
        ],
    )
    def test_processors_that_make_no_job(self, processors: Any, data: bool, says: str) -> None:
        config = SessionConfig(processor_cfg_map=processors, calib_data=samples() if data else None)
        with pytest.raises(RecipeError, match=says):
            quant_model(model(), config)

    def test_a_name_that_matches_nothing(self) -> None:
        with pytest.raises(
            RecipeError, match=r"disable_names: 'b\.0\.to_x' matches no layer; nearest: 'b\.0"
        ):
            quant_model(model(), session(w8a8=static("b.0.to_x")))

    @pytest.mark.parametrize("given", [{"w8a8": static()}, None])
    def test_a_session_that_is_none(self, given: Any) -> None:
        with pytest.raises(RecipeError, match="session_cfg: expected a SessionConfig, got "):
            quant_model(model(), given)

    def test_a_model_of_another_framework(self) -> None:
        with pytest.raises(
            GraphError, match=r"model: expected the path of an \.onnx file or .*, got object; export"
        ):
            quant_model(object(), session(w8a8=static()))  # type: ignore[arg-type]

    def test_nothing_but_convolutions(self) -> None:
        weights = weights_of(2, k=(8, 3, 3, 3), w=(8, 4))
        body = """g (float[N,3,8,8] x) => (float[N,4] y) {
          c = Conv (x, k)  p = GlobalAveragePool (c)  f = Flatten (p)  y = Gemm (f, w) }"""
        proto = parse(body, weights, 17, 8)
        config = SessionConfig(processor_cfg_map={"w8a8_dynamic": dynamic()})
        with pytest.raises(
            RecipeError, match=r"leaves convolutions and the last linear .* set quantize_conv"
        ):
            quant_model(proto, config)
        assert len(quant_model(proto, config, disable_last_linear=False).plan.weights) == 1

    def test_a_result_that_is_not_good_enough(self) -> None:
        with pytest.raises(VerificationError, match="below --min-sqnr 90"):
            quant_model(model(), session(w8a8=static()), min_sqnr=90)

    def test_two_files_of_one_name(self, tmp_path: Path) -> None:
        save = SaveProcessorConfig(output_path=str(tmp_path / "out"), json_name="model_w8a8.json")
        with pytest.raises(GraphError, match=r"two files of the result would be called 'model_w8a8\.json'"):
            quant_model(model(), session(w8a8=static(), save=save))
        assert not (tmp_path / "out").exists()


class TestFile:
    def test_the_same_session_for_the_command_line(self, tmp_path: Path) -> None:
        onnx.save(model(), tmp_path / "m.onnx")
        (tmp_path / "calib").mkdir()
        for index, (image,) in enumerate(samples()):
            np.savez(tmp_path / "calib" / f"{index}.npz", image=image)
        (tmp_path / "session.yaml").write_text(
            "processor_cfg_map:\n  m4:\n  w8a8: {cfg: {act_method: minmax}, disable_names: [b.0.to_q]}\n"
            "  save: {output_path: ignored, save_type: [ascendV1]}\n"
        )
        args = [str(tmp_path / "m.onnx"), str(tmp_path / "out"), "--calib", str(tmp_path / "calib")]
        assert main([*args, "--recipe", str(tmp_path / "session.yaml"), "-q"]) == 0
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"m_w8a8.onnx", "m_w8a8.json", "quant_model_description.json"} <= names
        document = json.loads((tmp_path / "out" / "m_w8a8.json").read_text())
        assert [step["type"] for step in document["recipe"]["steps"]] == ["iter_smooth", "quantize"]
        assert not (tmp_path / "ignored").exists()

    def test_what_the_script_says_beside_the_session(self, tmp_path: Path) -> None:
        """Arguments of quant_model are keys of the file; calibrate takes the same file."""
        onnx.save(model(), tmp_path / "m.onnx")
        np.savez(tmp_path / "calib.npz", image=samples()[0][0])
        (tmp_path / "session.yaml").write_text(
            "processor_cfg_map: {w8a8: {cfg: {}, disable_names: [decoder]}}\n"
            "names: {MatMul_q_0: decoder}\ndisable_last_linear: false\nquantize_conv: true\n"
        )
        given = [str(tmp_path / "m.onnx"), "--calib", str(tmp_path / "calib.npz")]
        recipe = ["--recipe", str(tmp_path / "session.yaml"), "-q"]
        assert main(["calibrate", *given, str(tmp_path / "stats"), *recipe]) == 0
        assert main([*given, str(tmp_path / "a.onnx"), *recipe]) == 0
        known = [given[0], "--stats", str(tmp_path / "stats")]
        assert main([*known, str(tmp_path / "b.onnx"), *recipe]) == 0
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
        skipped = json.loads((tmp_path / "a.json").read_text())["skipped"]
        assert {"MatMul_q_0"} == {name for name, why in skipped.items() if "excluded" in why}

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("processor_cfg_map: {w8a8: {disable_names: []}}", "W8A8ProcessorConfig: cfg: is required"),
            (
                "processor_cfg_map: {w8a8: {cfg: {act: 1}, disable_names: []}}",
                "cfg: W8A8QuantConfig: act: unknown field; accepted: act_method",
            ),
            ("processor_cfg_map: {w9: {}}", "processor 'w9' is unknown"),
            (
                "processor_cfg_map: 3",
                "s.yaml: SessionFile: processor_cfg_map: input should be a valid dictionary",
            ),
            (
                "processor_cfg_map: {}\ncalib: 3",
                "SessionFile: calib: unknown field; accepted: processor_cfg_map, ",
            ),
            ("processor_cfg_map: {m4: {1: 2}}", "processor_cfg_map.m4: M4ProcessorConfig: 1: unknown field"),
            ("processor_cfg_map: {m6: {cfg: {1: 2}}}", "processor_cfg_map.m6: M6ProcessorConfig: cfg"),
            (
                "processor_cfg_map: {}\nquantize_conv: 3",
                "SessionFile: quantize_conv: input should be a valid boolean",
            ),
            (
                "processor_cfg_map: {w8a8_dynamic: {cfg: {}, disable_names: [b.0.to_x]}}",
                "disable_names: 'b.0.to_x' matches no layer; nearest: 'b.0.to_",
            ),
            ("processor_cfg_map: {m4: {}}", "holds only m4"),
        ],
    )
    def test_refused(self, text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        onnx.save(model(), tmp_path / "m.onnx")
        (tmp_path / "s.yaml").write_text(text)
        args = [str(tmp_path / "m.onnx"), str(tmp_path / "out"), "--recipe", str(tmp_path / "s.yaml")]
        assert main(args) == 2
        assert says in capsys.readouterr().err
