"""PTQ on ONNX graphs: every scheme, policies, numbers against numpy, QUANTIZE -> save -> DEPLOY -> load."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from calib.types import Array, Range
from onnxslim_ptq.core.dtypes import INT4, INT8
from onnxslim_ptq.core.pack import pack_int4, unpack_int4
from onnxslim_ptq.core.qmath import params_from_range
from onnxslim_ptq.core.spec import PerChannel, PerTensor, QuantSpec
from onnxslim_ptq.frontends.golden_stick import (
    PTQ,
    AWQConfig,
    BackendTarget,
    GPTQQuantConfig,
    Network,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
    QuantGranularity,
    RoundToNearest,
    SmoothQuant,
    SmoothQuantConfig,
    export_checkpoint,
    int4,
    int8,
    load_checkpoint,
    save_checkpoint,
)
from tests import decoders
from tests.decoders import appending
from tests.graph.models import parse
from tests.models import outputs_of

ROOT = Path(__file__).resolve().parents[2]
NONE, ASCEND = BackendTarget.NONE, BackendTarget.ASCEND
SMOOTH, AWQ = OutliersSuppressionType.SMOOTH, OutliersSuppressionType.AWQ
OSL = OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE
OSP = OutliersSuppressionType.OUTLIER_SUPPRESSION_PLUS
GPTQ, PER_TOKEN, PER_GROUP = PrecisionRecovery.GPTQ, QuantGranularity.PER_TOKEN, QuantGranularity.PER_GROUP
A8: dict[str, Any] = {"act_quant_dtype": int8}
TOKEN: dict[str, Any] = {**A8, "act_quant_granularity": PER_TOKEN}
W4: dict[str, Any] = {"weight_quant_dtype": int4}
GROUP: dict[str, Any] = {"weight_quant_granularity": PER_GROUP, "group_size": 64}
ORDERED = GPTQQuantConfig(desc_act=True, static_groups=True)
WIDTH = 128


def network() -> onnx.ModelProto:
    """Three layers of a decoder's names; channels of the input differ in size."""
    rng = np.random.default_rng(0)
    weights = {
        f"w{i}": (rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32) for i in range(3)
    }
    weights["b1"] = rng.standard_normal(WIDTH).astype(np.float32)
    return parse(
        f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{
        ["/layers.0/up/MatMul"] a = MatMul (x, w0)
        r = Relu (a)
        ["/layers.0/down/MatMul"] b = MatMul (r, w1)
        c = Add (b, b1)
        s = Add (c, x)
        ["/layers.1/q_proj/MatMul"] y = MatMul (s, w2) }}""",
        weights,
    )


def samples(count: int = 5) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    sizes = np.geomspace(0.1, 5, WIDTH)
    return [{"x": (rng.standard_normal((1, 16, WIDTH)) * sizes).astype(np.float32)} for _ in range(count)]


def quantized(proto: onnx.ModelProto, feeds: Any, policies: Any = None, **fields: Any) -> tuple[PTQ, Network]:
    ptq = PTQ(PTQConfig(**{"backend": NONE, **fields}), policies)
    return ptq, ptq.convert(ptq.apply(proto, datasets=feeds))


SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "W8A16": ({}, "W8-per_channel"),
    "W8A8": (A8, "W8-per_channel-A8-per_tensor"),
    "W8A8 smooth": ({**A8, "outliers_suppression": SMOOTH}, "SmoothQuant-W8-per_channel-A8-per_tensor"),
    "W8A8 OSL": ({**A8, "outliers_suppression": OSL}, "OSL-wclip-W8-per_channel-A8-per_tensor"),
    "W8A8 OS+": ({**A8, "outliers_suppression": OSP}, "OutlierSuppressionPlus-W8-per_channel-A8-per_tensor"),
    "W8A8 per token": (TOKEN, "W8-per_channel-A8-per_token"),
    "W8A8 per token smooth": (
        {**TOKEN, "outliers_suppression": SMOOTH},
        "SmoothQuant-W8-per_channel-A8-per_token",
    ),
    "W4A16": (W4, "W4-per_channel"),
    "W4A16 groups": ({**W4, **GROUP}, "W4-per_group"),
    "W4A16 groups of 128": ({**W4, **GROUP, "group_size": 128}, "W4-per_group"),
    "W4A16 AWQ": ({**W4, **GROUP, "outliers_suppression": AWQ}, "AWQ-wclip-W4-per_group"),
    "W4A16 GPTQ": (
        {**W4, **GROUP, "precision_recovery": GPTQ, "algo_args": GPTQQuantConfig()},
        "GPTQ-W4-per_group",
    ),
    "A8W4": (
        {**W4, **TOKEN, "precision_recovery": GPTQ, "algo_args": ORDERED},
        "GPTQ-W4-per_channel-A8-per_token",
    ),
    "A8W4 groups": (
        {**W4, **TOKEN, **GROUP, "precision_recovery": GPTQ, "algo_args": ORDERED},
        "GPTQ-W4-per_group-A8-per_token",
    ),
    "ASCEND W8A8 smooth": (
        {**A8, "outliers_suppression": SMOOTH, "backend": ASCEND},
        "SmoothQuant-W8-per_tensor-A8-per_tensor",
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
class TestSchemes:
    def test_quantize_save_deploy_load(self, scheme: str, tmp_path: Path) -> None:
        """The deployed graph with the checkpoint in it is byte for byte the quantized one."""
        fields, tag = SCHEMES[scheme]
        fields = {"backend": NONE, **fields}
        ptq, net = quantized(network(), samples(), **fields)
        assert ptq.summary(net)["layers.0.up"] == tag
        assert net.result is not None
        cosine = net.result.metrics["cosine"]
        assert cosine > (0.98 if fields.get("weight_quant_dtype") is int4 else 0.999)
        path = save_checkpoint(net, tmp_path / "c.safetensors")
        deploy = PTQ(PTQConfig(mode=PTQMode.DEPLOY, **fields))
        there = deploy.convert(deploy.apply(network()))
        with pytest.raises(ValueError, match="placeholders"):
            there.save(tmp_path / "q.onnx")
        assert deploy.summary(there) == ptq.summary(net)
        load_checkpoint(path, there)
        assert there.model.SerializeToString(deterministic=True) == net.model.SerializeToString(
            deterministic=True
        )


class TestCache:
    @pytest.mark.parametrize("granularity", [QuantGranularity.PER_CHANNEL, PER_TOKEN])
    @pytest.mark.parametrize("more", [{"weight_quant_dtype": None}, {**A8, "outliers_suppression": SMOOTH}])
    def test_c8(self, granularity: QuantGranularity, more: dict[str, Any], tmp_path: Path) -> None:
        fields = {"kvcache_quant_dtype": int8, "kvcache_quant_granularity": granularity, **more}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ptq, net = quantized(appending(), decoders.feeds(appending()), **fields)
        assert ptq.summary(net)["past_key_values.0.key"] == f"C8-{granularity}"
        assert len(ptq.summary(net)) == (2 if "weight_quant_dtype" in more else 6)
        types = {i.name: i.type.tensor_type.elem_type for i in net.model.graph.input}
        assert types["past_key_values.0.key"] == onnx.TensorProto.INT8
        path = save_checkpoint(net, tmp_path / "c.safetensors")
        deploy = PTQ(PTQConfig(mode=PTQMode.DEPLOY, backend=NONE, **fields))
        there = deploy.convert(deploy.apply(appending()), str(path))
        assert there.model.SerializeToString(deterministic=True) == net.model.SerializeToString(
            deterministic=True
        )

    def test_static_scales_are_of_full_range(self) -> None:
        feeds = decoders.feeds(appending(), 5)
        _, net = quantized(appending(), feeds, weight_quant_dtype=None, kvcache_quant_dtype=int8)
        assert net.result is not None
        weight = next(onnx.numpy_helper.to_array(t) for t in appending().graph.initializer if t.name == "wv")
        values = np.concatenate([f["x"] @ weight for f in feeds], axis=1).reshape(-1, 2, 8)
        expected = np.abs(values).max(axis=0) / 127.5
        np.testing.assert_allclose(net.result.plan.io[1].scale[0, :, 0], expected, rtol=1e-5)

    def test_a_blacklisted_cache_stays_float(self) -> None:
        _, net = quantized(
            appending(),
            decoders.feeds(appending()),
            weight_quant_dtype=None,
            kvcache_quant_dtype=int8,
            opname_blacklist=[".0.key"],
        )
        assert list(net.tags) == ["past_key_values.0.value"]


class TestFreshProcess:
    def test_identical_outputs(self, tmp_path: Path) -> None:
        onnx.save(network(), tmp_path / "f.onnx")
        _, net = quantized(tmp_path / "f.onnx", samples(), **A8, outliers_suppression=SMOOTH)  # type: ignore[arg-type]
        save_checkpoint(net, tmp_path / "c.safetensors")
        np.save(tmp_path / "x.npy", samples()[0]["x"])
        script = """
import sys, numpy as np, onnxruntime as ort
from onnxslim_ptq.frontends.golden_stick import *
config = PTQConfig(mode=PTQMode.DEPLOY, backend=BackendTarget.NONE, act_quant_dtype=int8,
                   outliers_suppression=OutliersSuppressionType.SMOOTH)
ptq = PTQ(config)
net = ptq.convert(ptq.apply("f.onnx"))
load_checkpoint("c.safetensors", net)
session = ort.InferenceSession(net.save("q.onnx"), providers=["CPUExecutionProvider"])
np.save("y.npy", session.run(None, {"x": np.load("x.npy")})[0])
"""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
        (expected,) = outputs_of(net.model, [samples()[0]])[0]
        assert np.load(tmp_path / "y.npy").tobytes() == expected.tobytes()

    def test_a_checkpoint_of_another_network(self, tmp_path: Path) -> None:
        _, net = quantized(network(), samples(), **A8)
        path = save_checkpoint(net, tmp_path / "c.safetensors")
        for fields, words in (({}, "unknown parameter"), ({**A8, "outliers_suppression": SMOOTH}, "lacks")):
            deploy = PTQ(PTQConfig(mode=PTQMode.DEPLOY, backend=NONE, **fields))
            with pytest.raises(ValueError, match=words):
                deploy.convert(deploy.apply(network()), str(path))
        (tmp_path / "bad").write_bytes(b"no checkpoint")
        with pytest.raises(ValueError, match="is no checkpoint"):
            load_checkpoint(tmp_path / "bad", net)
        for told in ('["w0"]', '{"w0": "object"}', "[" * 100_000):
            save_file(load_file(path), tmp_path / "told", metadata={"packed_int4": told})
            with pytest.raises(ValueError, match="is no table of int4 and uint4"):
                load_checkpoint(tmp_path / "told", net)

    def test_placeholders_are_zeros_and_ones(self, tmp_path: Path) -> None:
        deploy = PTQ(PTQConfig(mode=PTQMode.DEPLOY, backend=NONE, **A8))
        net = deploy.convert(deploy.apply(network()))
        with pytest.raises(ValueError, match="placeholders"):
            save_checkpoint(net, tmp_path / "c")
        found = net.parameters_dict()
        assert not found["w0_quantized"].any()
        assert found["w0_quantized"].dtype == np.int8
        assert (found["w0_scale"] == 1).all()


class TestPolicies:
    @pytest.mark.parametrize(
        "policies",
        [
            {"a": None},
            [("a", None)],
            OrderedDict({1: None}),
            OrderedDict({"a": "W8A8"}),
            OrderedDict({"(": PTQConfig()}),
        ],
    )
    def test_bad_policies(self, policies: Any) -> None:
        with pytest.raises(TypeError):
            PTQ(PTQConfig(), policies)

    def test_a_regular_expression_matches_the_start_of_the_name(self) -> None:
        policies = OrderedDict({r"layers\.1": PTQConfig(backend=NONE, **W4), "up": None})
        ptq, net = quantized(network(), samples(), policies, **A8)
        assert ptq.summary(net) == {
            "layers.0.up": "W8-per_channel-A8-per_tensor",
            "layers.0.down": "W8-per_channel-A8-per_tensor",
            "layers.1.q_proj": "W4-per_channel",
        }

    def test_none_leaves_layers_alone(self) -> None:
        ptq, net = quantized(network(), samples(), OrderedDict({r".*\.up": None}), **A8)
        assert list(ptq.summary(net)) == ["layers.0.down", "layers.1.q_proj"]

    def test_two_matches_are_an_error(self) -> None:
        both = OrderedDict({r"layers\.0": None, r".*up": None})
        with pytest.raises(RuntimeError, match=r"'layers\.0\.up' matches two layer policies"):
            quantized(network(), samples(), both)

    def test_mode_and_backend_are_the_networks(self) -> None:
        with pytest.warns(UserWarning, match="backend is none, the network's"):
            PTQ(PTQConfig(backend=NONE), OrderedDict({"a": PTQConfig(backend=ASCEND)}))

    @pytest.mark.parametrize(
        ("blacklist", "left"),
        [
            (["q_proj"], ["layers.0.up", "layers.0.down"]),
            (["layers.0"], ["layers.1.q_proj"]),
            (["LAYERS.0"], ["layers.0.up", "layers.0.down", "layers.1.q_proj"]),
            (["/layers.0/up"], ["layers.0.down", "layers.1.q_proj"]),
        ],
    )
    def test_blacklist_is_a_substring(self, blacklist: list[str], left: list[str]) -> None:
        ptq, net = quantized(network(), samples(), opname_blacklist=blacklist)
        assert list(ptq.summary(net)) == left

    def test_summary_before_apply_is_empty(self) -> None:
        assert PTQ(PTQConfig()).summary(network()) == {}
        with pytest.raises(TypeError):
            PTQ(PTQConfig()).summary(3)  # type: ignore[arg-type]

    def test_nothing_to_quantize(self) -> None:
        with pytest.warns(UserWarning, match="nothing in this network is quantized"):
            ptq, net = quantized(network(), samples(), opname_blacklist=[""])
        assert ptq.summary(net) == {}
        assert net.model.SerializeToString() == network().SerializeToString()


class TestArguments:
    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"act_quant_dtype": int8, "weight_quant_dtype": None}, "needs weight_quant_dtype"),
            ({**A8, "outliers_suppression": AWQ}, "neither with AWQ nor with GPTQ"),
            ({**A8, "precision_recovery": GPTQ, "algo_args": {"block_size": 128}}, "neither with AWQ"),
            ({"outliers_suppression": OSL}, "goes with W8A8"),
            ({**A8, "outliers_suppression": OSL, "kvcache_quant_dtype": int8}, "float KV cache only"),
            ({**TOKEN, **W4, "precision_recovery": GPTQ, "algo_args": {"desc_act": False}}, "desc_act=True"),
            ({**W4, "kvcache_quant_dtype": int8}, "int4 weights do not go with"),
        ],
    )
    def test_what_does_not_go_together(self, fields: dict[str, Any], text: str) -> None:
        config = PTQConfig(backend=NONE, **fields)
        with pytest.raises(ValueError, match=text):
            PTQ(config).apply(network(), datasets=samples())

    def test_types(self) -> None:
        with pytest.raises(TypeError):
            PTQ({"mode": "quantize"})  # type: ignore[arg-type]
        ptq = PTQ(PTQConfig(backend=NONE))
        with pytest.raises(TypeError):
            ptq.apply(3, datasets=samples())  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            ptq.apply(network(), helper=3, datasets=samples())  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            ptq.apply(network(), datasets=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="QUANTIZE needs datasets"):
            ptq.apply(network())
        with pytest.raises(TypeError):
            ptq.convert(network())  # type: ignore[arg-type]
        net = ptq.apply(network(), datasets=samples())
        with pytest.raises(TypeError):
            ptq.convert(net, 3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is no file"):
            ptq.convert(net, "nowhere")
        with pytest.raises(ValueError, match="not converted yet"):
            net.parameters_dict()

    def test_a_helper_makes_feeds(self) -> None:
        ptq = PTQ(PTQConfig(backend=NONE, **A8))
        arrays = [feed["x"] for feed in samples()]
        helped = ptq.apply(network(), lambda x: {"x": x}, arrays)
        plain = ptq.apply(network(), datasets=samples())
        assert ptq.convert(helped).model == ptq.convert(plain).model

    def test_ascend_without_such_a_form_is_told(self) -> None:
        with pytest.warns(UserWarning, match="written as plain ONNX"):
            _, net = quantized(network(), samples(), backend=ASCEND)
        assert "AscendQuant" not in {n.op_type for n in net.model.graph.node}
        _, net = quantized(network(), samples(), **A8, backend=ASCEND)
        assert "AscendQuant" in {n.op_type for n in net.model.graph.node}

    def test_what_has_no_effect_is_told(self) -> None:
        with pytest.warns(UserWarning, match="algo_args: nothing reads alpa"):
            PTQ(PTQConfig(**A8, outliers_suppression=SMOOTH, algo_args={"alpa": 0.9}))
        with pytest.warns(
            UserWarning, match="kvcache_quant_dtype has no effect; give it to the network's config"
        ):
            PTQ(
                PTQConfig(backend=NONE), OrderedDict({"a": PTQConfig(backend=NONE, kvcache_quant_dtype=int8)})
            )
        with pytest.warns(UserWarning, match="this network has no KV cache"):
            quantized(network(), samples(), kvcache_quant_dtype=int8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PTQ(PTQConfig(**W4, outliers_suppression=AWQ, algo_args=AWQConfig()))

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"block_size": 0}, "block_size"),
            ({"damp_percent": 2.0}, "damp_percent"),
        ],
    )
    def test_bad_gptq_arguments(self, arguments: dict[str, Any], text: str) -> None:
        config = PTQConfig(backend=NONE, **W4, precision_recovery=GPTQ, algo_args=arguments)
        with pytest.raises(ValueError, match=text):
            PTQ(config).apply(network(), datasets=samples())

    def test_uneven_clip_ratios(self) -> None:
        odd = AWQConfig(weight_clip_ratio=[1.0, 0.9, 0.5])
        config = PTQConfig(backend=NONE, **W4, outliers_suppression=AWQ, algo_args=odd)
        with pytest.raises(ValueError, match="weight_clip_ratio"):
            PTQ(config).apply(network(), datasets=samples())

    def test_smooth_strength_is_checked_when_used(self) -> None:
        config = PTQConfig(backend=NONE, **A8, outliers_suppression=SMOOTH, algo_args=SmoothQuantConfig(7.0))
        with pytest.raises(ValueError, match="alpha"):
            PTQ(config).apply(network(), datasets=samples())


class TestNumbers:
    def test_scales_and_zero_points(self) -> None:
        """Symmetric: amax / 127.5; asymmetric: (max - min) / 255."""
        span = Range(np.float64(-1), np.float64(2))  # type: ignore[arg-type]
        full = params_from_range(span, QuantSpec(INT8, PerTensor(), True, full_range=True))
        assert float(full.scale) == pytest.approx(0.01568627, rel=1e-6)
        assert int(full.zero_point) == 0
        small = params_from_range(span, QuantSpec(INT4, PerTensor(), True, full_range=True))
        assert float(small.scale) == pytest.approx(2 / 7.5)
        for lo, hi, scale, zero in ((-1.0, 2.0, 0.0117647, -43), (0.0, 6.0, 0.0235294, -128)):
            found = params_from_range(
                Range(np.asarray(lo), np.asarray(hi)), QuantSpec(INT8, PerTensor(), False)
            )
            assert float(found.scale) == pytest.approx(scale, rel=1e-5)
            assert int(found.zero_point) == zero
        away = params_from_range(
            Range(np.asarray(10.0), np.asarray(11.0)), QuantSpec(INT8, PerTensor(), False)
        )
        assert int(away.zero_point) == -128  # the range is widened to contain 0, unlike the original

    def test_plain_w8a8(self) -> None:
        """Weights symmetric per channel, activations asymmetric per tensor, both from the extremes; the bias stays."""
        _, net = quantized(network(), samples(), **A8)
        assert net.result is not None
        plan = net.result.plan
        weight = next(onnx.numpy_helper.to_array(t) for t in network().graph.initializer if t.name == "w0")
        codes = next(c for c in plan.weight_codes.values() if c.name == "w0")
        assert codes.params.spec.grain == PerChannel(1)
        assert codes.params.spec.symmetric
        scale = np.abs(weight).max(axis=0) / 127.5
        np.testing.assert_allclose(codes.params.scale, scale, rtol=1e-6)
        np.testing.assert_array_equal(codes.codes, np.clip(np.rint(weight / scale), -128, 127))
        x = np.concatenate([f["x"] for f in samples()])
        params = next(p for key, p in plan.params.items() if key.startswith("x@"))
        assert float(params.scale) == pytest.approx((x.max() - x.min()) / 255, rel=1e-5)
        assert int(params.zero_point) == round(-128 - float(x.min()) / float(params.scale))
        (bias,) = (onnx.numpy_helper.to_array(t) for t in net.model.graph.initializer if t.name == "b1")
        np.testing.assert_array_equal(bias, _bias())

    @pytest.mark.parametrize("transposed", [False, True])
    def test_smooth_scale(self, transposed: bool) -> None:
        """s = a^0.5 / w^0.5 per input channel; x is multiplied by 1 / s and W by s."""
        rng = np.random.default_rng(3)
        weight = rng.standard_normal((16, 8)).astype(np.float32)
        body = "y = MatMul (x, w)" if not transposed else "y = Gemm <transB = 1> (x, w)"
        stored = np.ascontiguousarray(weight.T) if transposed else weight
        proto = parse(f"g (float[N,16] x) => (float[N,8] y) {{ {body} }}", {"w": stored})
        feeds = [
            {"x": (rng.standard_normal((12, 16)) * np.geomspace(0.1, 9, 16)).astype(np.float32)}
            for _ in range(4)
        ]
        _, net = quantized(proto, feeds, **A8, outliers_suppression=SMOOTH)
        assert net.result is not None
        x = np.concatenate([f["x"] for f in feeds])
        s = np.sqrt(np.abs(x).max(axis=0) / np.abs(weight).max(axis=1))
        (factor,) = (v for name, v in net.parameters_dict().items() if name == "x.scaled.by")
        np.testing.assert_allclose(factor, 1 / s, rtol=1e-5)
        smoothed = weight * s[:, None]
        (codes,) = net.result.plan.weight_codes.values()
        np.testing.assert_allclose(codes.params.scale, np.abs(smoothed).max(axis=0) / 127.5, rtol=1e-5)
        (params,) = net.result.plan.params.values()
        even = x / s
        assert float(params.scale) == pytest.approx((even.max() - even.min()) / 255, rel=1e-4)
        (seen,) = outputs_of(net.model, [feeds[0]])[0]
        error = np.linalg.norm(seen - feeds[0]["x"] @ weight) / np.linalg.norm(feeds[0]["x"] @ weight)
        assert error < 2e-2

    def test_the_full_quant_example(self) -> None:
        """X = [[1, 10], [12, 14]], W = [[2, 4], [1, 3]], bias 1: the integers of the original within its 7e-2."""
        w, x = np.array([[2, 4], [1, 3]], np.float32), np.array([[1, 10], [12, 14]], np.float32)
        proto = parse(
            "g (float[2,2] x) => (float[2,2] y) { y = Gemm (x, w, b) }", {"w": w, "b": np.ones(2, np.float32)}
        )
        _, net = quantized(proto, [{"x": x}], **A8)
        (seen,) = outputs_of(net.model, [{"x": x}])[0]
        np.testing.assert_allclose(seen, [[13, 35], [39, 91]], rtol=7e-2)
        np.testing.assert_allclose(seen, [[13, 32.909], [39, 90.325]], rtol=7e-2)

    def test_int4_in_bytes(self) -> None:
        codes = np.array([[1, -1, 7, -8], [0, 2, -3, 4]], np.int8)
        packed = pack_int4(codes)
        assert packed.tolist() == [[-15, -121], [32, 77]]
        np.testing.assert_array_equal(unpack_int4(packed), codes)

    def test_a_dead_channel_is_no_nan(self) -> None:
        proto = network()
        weight = next(t for t in proto.graph.initializer if t.name == "w0")
        values = onnx.numpy_helper.to_array(weight).copy()
        values[:, 5] = 0
        weight.CopyFrom(onnx.numpy_helper.from_array(values, "w0"))
        _, net = quantized(proto, samples(), **A8)
        found = net.parameters_dict()
        assert all(np.isfinite(v).all() for v in found.values() if v.dtype == np.float32)
        assert found["w0_scale"][5] == 1


def _bias() -> Array:
    return next(onnx.numpy_helper.to_array(t) for t in network().graph.initializer if t.name == "b1")


class TestEntryPoints:
    @pytest.mark.parametrize(
        ("fields", "kind"),
        [
            ({"backend": NONE}, ValueError),
            ({"kvcache_quant_dtype": int8}, ValueError),
            ({"outliers_suppression": SMOOTH}, ValueError),
            (A8, ValueError),
            (TOKEN, ValueError),
            (W4, ValueError),
        ],
    )
    def test_round_to_nearest_refuses(self, fields: dict[str, Any], kind: type[Exception]) -> None:
        with pytest.raises(kind, match="RoundToNearest"):
            RoundToNearest(PTQConfig(**fields))

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            A8,
            {**TOKEN, "outliers_suppression": SMOOTH},
            {**A8, "outliers_suppression": SMOOTH, "kvcache_quant_dtype": int8},
            {**A8, "outliers_suppression": SMOOTH, "backend": NONE},
        ],
    )
    def test_smooth_quant_refuses(self, fields: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="SmoothQuant"):
            SmoothQuant(PTQConfig(**fields))

    def test_not_a_config(self) -> None:
        for entry in (RoundToNearest, SmoothQuant):
            with pytest.raises(TypeError):
                entry({"mode": "quantize"})  # type: ignore[arg-type]

    def test_round_to_nearest_needs_no_data(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ascend has no form of weights alone
            rtn = RoundToNearest(PTQConfig())
            net = rtn.convert(rtn.apply(network()))
            path = save_checkpoint(net, tmp_path / "c")
            dynamic = RoundToNearest(PTQConfig(mode=PTQMode.DEPLOY))
            there = dynamic.convert(dynamic.apply(network()), str(path))
        assert set(rtn.summary(net).values()) == {"W8-per_channel"}
        assert there.model == net.model

    def test_smooth_quant(self) -> None:
        entry = SmoothQuant()
        net = entry.convert(entry.apply(network(), datasets=samples()))
        assert entry.summary(net)["layers.0.up"] == "SmoothQuant-W8-per_tensor-A8-per_tensor"
        assert net.result is not None
        assert net.result.metrics["sqnr_db"] > 25


class TestExport:
    """The parameters under Golden Stick's names compute what the written graph computes."""

    def test_smoothed_w8a8(self, tmp_path: Path) -> None:
        _, net = quantized(network(), samples(), **A8, outliers_suppression=SMOOTH)
        found = load_file(export_checkpoint(net, tmp_path / "g.safetensors"))
        layer = "layers.0.up"
        assert found[f"{layer}.quant_op.input_scale"].shape == (WIDTH,)
        assert found[f"{layer}.quant_op.input_zp"].shape == (WIDTH,)
        assert not any(name.endswith(".scaled.by") for name in found)
        x = samples()[0]["x"]
        scale, zero = (found[f"{layer}.quant_op.input_{part}"] for part in ("scale", "zp"))
        codes = np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int64)
        deq = found[f"{layer}._layer.matmul.dequant_scale"].astype(np.int32).view(np.float32)
        sums = codes @ found[f"{layer}._layer.weight"].astype(np.int64).T
        ours = (sums + found[f"{layer}._layer.matmul.quant_bias"]) * deq
        proto = net.model
        proto.graph.output.append(onnx.ValueInfoProto(name="a"))
        seen = outputs_of(proto, [{"x": x}])[0][1]
        assert np.abs(ours - seen).max() < 0.02 * np.abs(seen).max()
        assert np.linalg.norm(ours - seen) < 2e-3 * np.linalg.norm(seen)
        np.testing.assert_array_equal(found["layers.0.down._layer.bias"], _bias())

    def test_smooth_scale_per_token(self, tmp_path: Path) -> None:
        _, net = quantized(network(), samples(), **TOKEN, outliers_suppression=SMOOTH)
        found = load_file(export_checkpoint(net, tmp_path / "g.safetensors"))
        factor = net.parameters_dict()["x.scaled.by"]
        np.testing.assert_allclose(found["layers.0.up._layer.matmul.smooth_scale"], factor, rtol=1e-6)
        assert "layers.0.up._layer.matmul.weight_zp" not in found

    @pytest.mark.parametrize("fields", [W4, {**W4, **GROUP}])
    def test_int4(self, fields: dict[str, Any], tmp_path: Path) -> None:
        _, net = quantized(network(), samples(), **fields)
        found = load_file(export_checkpoint(net, tmp_path / "g.safetensors"))
        codes = unpack_int4(found["layers.0.up._layer.weight"])
        scale = found["layers.0.up._layer.matmul.weight_scale"]
        weight = next(onnx.numpy_helper.to_array(t) for t in network().graph.initializer if t.name == "w0")
        assert scale.shape == ((WIDTH,) if fields == W4 else (WIDTH // 64, WIDTH))
        scale = np.atleast_2d(scale)
        rows = scale.repeat(WIDTH // len(scale), axis=0)
        assert (np.abs(codes * rows - weight) <= rows * 0.5001).all()
        np.testing.assert_array_equal(found["layers.0.down._layer.bias"], _bias())
        assert "b1" not in found

    def test_only_after_quantize(self, tmp_path: Path) -> None:
        deploy = PTQ(PTQConfig(mode=PTQMode.DEPLOY, backend=NONE))
        with pytest.raises(ValueError, match="only the network of a QUANTIZE run"):
            export_checkpoint(deploy.convert(deploy.apply(network())), tmp_path / "g.safetensors")
