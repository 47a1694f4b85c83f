"""The rounding step: weights of all kinds of layers as matrices, Gram matrices in a budget, never worse than rtn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from calib.types import Feed
from onnxslim_ptq.core.qmath import dequantize
from onnxslim_ptq.core.rounding import Rounder
from onnxslim_ptq.core.spec import QuantPlan
from onnxslim_ptq.rounders import ROUNDERS, AdaRound, Gptq, SQuant
from onnxslim_ptq.steps import rounding
from onnxslim_ptq.workspace import Workspace
from tests.graph.models import parse, run
from tests.models import weights_of
from tests.steps.layers import PLAIN, apply_step, workspace_of

IMAGE = "float[N,12,8,8] x"
LAYERS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "pointwise": (f"g ({IMAGE}) => (float[N,16,8,8] y) {{ [l] y = Conv (x, w) }}", {"w": (16, 12, 1, 1)}),
    "conv": (
        f"g ({IMAGE}) => (float[N,16,8,8] y) {{ [l] y = Conv <pads = [1, 1, 1, 1]> (x, w) }}",
        {"w": (16, 12, 3, 3)},
    ),
    "strided": (
        f"g ({IMAGE}) => (float[N,16,4,4] y) "
        "{ [l] y = Conv <strides = [2, 2], pads = [0, 0, 1, 1], dilations = [1, 1]> (x, w) }",
        {"w": (16, 12, 3, 3)},
    ),
    "same": (
        f'g ({IMAGE}) => (float[N,16,8,8] y) {{ [l] y = Conv <auto_pad = "SAME_UPPER"> (x, w) }}',
        {"w": (16, 12, 3, 3)},
    ),
    "grouped": (
        f"g ({IMAGE}) => (float[N,16,6,6] y) {{ [l] y = Conv <group = 2> (x, w) }}",
        {"w": (16, 6, 3, 3)},
    ),
    "depthwise": (
        f"g ({IMAGE}) => (float[N,24,6,6] y) {{ [l] y = Conv <group = 12> (x, w) }}",
        {"w": (24, 1, 3, 3)},
    ),
    "transposed": (
        f"g ({IMAGE}) => (float[N,16,16,16] y) {{ [l] y = ConvTranspose <strides = [2, 2]> (x, w) }}",
        {"w": (12, 16, 2, 2)},
    ),
    "gemm": ("g (float[N,12] x) => (float[N,16] y) { [l] y = Gemm (x, w) }", {"w": (12, 16)}),
    "gemm transB": (
        "g (float[N,12] x) => (float[N,16] y) { [l] y = Gemm <transB = 1> (x, w) }",
        {"w": (16, 12)},
    ),
    "gemm transA": (
        "g (float[12,N] x) => (float[N,16] y) { [l] y = Gemm <transA = 1> (x, w) }",
        {"w": (12, 16)},
    ),
    "matmul": ("g (float[N,7,12] x) => (float[N,7,16] y) { [l] y = MatMul (x, w) }", {"w": (12, 16)}),
}


def model(name: str) -> onnx.ModelProto:
    body, shapes = LAYERS[name]
    return parse(body, weights_of(5, **shapes))


def feeds(name: str) -> list[Feed]:
    """Correlated channels with means of their own."""
    rng = np.random.default_rng(3)
    mix, mean = rng.standard_normal((12, 12)), rng.uniform(0, 2, 12)
    made: list[Feed] = []
    for _ in range(24):
        rows = rng.standard_normal((4, 64, 12)) @ mix + mean
        if "gemm" in name:
            x = rows[0, :20].T if "transA" in name else rows[0, :20]
        else:
            x = rows[:, :7] if name == "matmul" else rows.transpose(0, 2, 1).reshape(4, 12, 8, 8)
        made.append({"x": np.ascontiguousarray(x, np.float32)})
    return made


def applied(name: str, rounder: Rounder, **choice: Any) -> tuple[Workspace, QuantPlan]:
    workspace = workspace_of(model(name), feeds(name))
    plan, _ = apply_step(workspace, replace(PLAIN, rounder=rounder, **choice))
    return workspace, plan


def output_error(workspace: Workspace, plan: QuantPlan, name: str) -> float:
    """What the codes really do to the layer's output: the model is run with the weight they stand for."""
    ((use, slot),) = plan.weights.items()
    codes, graph = plan.weight_codes[slot.params], workspace.graph
    graph.set_value(graph.node(use.node).inputs[use.port], dequantize(codes.codes, codes.params))
    rounded, exact = graph.to_model(), model(name)
    pairs = [(run(rounded, f)[0], run(exact, f)[0]) for f in feeds(name)]
    noise = sum(float(((a.astype(np.float64) - b) ** 2).sum()) for a, b in pairs)
    return noise / sum(float((b.astype(np.float64) ** 2).sum()) for _, b in pairs)


@pytest.mark.parametrize("name", list(LAYERS))
def test_outputs_get_better_by_what_is_reported(name: str) -> None:
    plain = output_error(*applied(name, ROUNDERS["rtn"]()), name)
    workspace, plan = applied(name, AdaRound())
    (codes,) = plan.weight_codes.values()
    assert codes.rounder == "adaround"
    assert codes.error is not None
    before, after = codes.error
    assert list(codes.codes.shape) == model(name).graph.initializer[0].dims
    found = output_error(workspace, plan, name)
    assert found < (1 if name == "depthwise" else 0.8) * plain, "neighbouring pixels are independent here"
    # Windows are drawn, and of the same padding only those of stride 1 are known: the report is an estimate.
    assert before == pytest.approx(plain, rel=0.1)
    assert after == pytest.approx(found, rel=0.2)
    (note,) = (n for n in plan.notes if n.startswith("rounder adaround: 1 weights"))
    assert f"{10 * np.log10(after):.1f} dB now" in note


@pytest.mark.parametrize("name", ["conv", "depthwise", "gemm", "matmul"])
@pytest.mark.parametrize("rounder", sorted(ROUNDERS))
def test_every_rounder_on_layers(rounder: str, name: str) -> None:
    _, plan = applied(name, ROUNDERS[rounder]())
    (codes,) = plan.weight_codes.values()
    assert codes.rounder == rounder
    assert np.abs(codes.codes.astype(int)).max() <= 127
    assert codes.codes.flags.c_contiguous
    if codes.error is not None:
        assert codes.error[1] <= codes.error[0]


@pytest.mark.parametrize("reduce_range", [False, True])
def test_limits(reduce_range: bool) -> None:
    workspace = workspace_of(model("conv"), feeds("conv"), reduce_range=reduce_range)
    plan, _ = apply_step(workspace, replace(PLAIN, rounder=AdaRound(reach=3)))
    (codes,) = plan.weight_codes.values()
    assert np.abs(codes.codes.astype(int)).max() <= (64 if reduce_range else 127)


def test_with_bias_correction_the_mean_does_not_count() -> None:
    """The bias takes out (W - W_hat) E[x], so only the error around the mean is lowered; both together beat either."""
    errors = {}
    for correction in (False, True):
        workspace, plan = applied("pointwise", AdaRound(), bias_correction=correction)
        errors[correction] = output_error(workspace, plan, "pointwise")
    assert errors[True] < errors[False]


def test_a_budget_means_more_sweeps_and_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    body = f"""g ({IMAGE}) => (float[N,12,8,8] y) {{
        a = Conv <pads = [1, 1, 1, 1]> (x, u) b = Relu (a) c = Conv <pads = [1, 1, 1, 1]> (b, v)
        d = Relu (c) y = Conv <pads = [1, 1, 1, 1]> (d, w) }}"""
    proto = parse(body, weights_of(5, u=(12, 12, 3, 3), v=(12, 12, 3, 3), w=(12, 12, 3, 3)))

    def codes_and_sweeps() -> tuple[list[np.ndarray], int, Workspace]:
        workspace, sweeps = workspace_of(proto, feeds("conv")[:6]), []
        gather = workspace.collect
        monkeypatch.setattr(workspace, "collect", lambda p: sweeps.append(len(list(p))) or gather(p))
        plan, _ = apply_step(workspace, replace(PLAIN, rounder=Gptq()))
        return [c.codes for c in plan.weight_codes.values()], len(sweeps), workspace

    whole, few, workspace = codes_and_sweeps()
    assert not any(p.kind == "gram" for p, _ in workspace.memo), "Gram matrices are freed"
    monkeypatch.setattr(rounding, "_BUDGET", 120_000)  # one matrix of 108 x 108 takes 100 kB
    pieces, many, _ = codes_and_sweeps()
    assert many == few + 2
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_keeps_rtn_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_BUDGET", 50_000)
    _, plan = applied("conv", Gptq())
    (codes,) = plan.weight_codes.values()
    assert codes.rounder == "rtn"
    assert any(
        "rounded to nearest: the Gram matrix of its inputs takes" in n and "(l)" in n for n in plan.notes
    )
    _, plan = applied("conv", SQuant())
    assert next(iter(plan.weight_codes.values())).rounder == "squant", "it needs no Gram matrix"


def test_a_stack_of_matrices_keeps_rtn() -> None:
    proto = parse(
        "g (float[2,7,12] x) => (float[2,7,16] y) { [l] y = MatMul (x, w) }", weights_of(5, w=(2, 12, 16))
    )
    workspace = workspace_of(proto, [{"x": np.ones((2, 7, 12), np.float32)}])
    plan, _ = apply_step(workspace, replace(PLAIN, rounder=Gptq()))
    assert next(iter(plan.weight_codes.values())).rounder == "rtn"
    assert any("a stack of matrices (l)" in n for n in plan.notes)


def test_shared_weights_see_the_inputs_of_all_their_readers() -> None:
    body = "g (float[N,12] x, float[N,12] z) => (float[N,16] y, float[N,16] q) { y = MatMul (x, w) q = MatMul (z, w) }"
    proto = parse(body, weights_of(5, w=(12, 16)))
    rng = np.random.default_rng(0)
    mixes = rng.standard_normal((2, 12, 12))
    samples: list[Feed] = [
        {n: (rng.standard_normal((20, 12)) @ m).astype(np.float32) for n, m in zip("xz", mixes, strict=True)}
        for _ in range(8)
    ]
    workspace = workspace_of(proto, samples)
    plan, _ = apply_step(workspace, replace(PLAIN, rounder=AdaRound()))
    (codes,) = plan.weight_codes.values()
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float64)
    change = weight - dequantize(codes.codes, codes.params)
    noise = sum(((s[n] @ change) ** 2).sum() for s in samples for n in "xz")
    signal = sum(((s[n] @ weight) ** 2).sum() for s in samples for n in "xz")
    assert codes.error is not None
    assert codes.error[1] == pytest.approx(noise / signal, rel=0.03)


def test_room_for_a_bias_leaves_the_other_channels_alone() -> None:
    """A channel whose scale is raised for int32 is rounded again; what the rounder chose elsewhere stays."""
    weights = weights_of(5, w=(16, 12, 1, 1))
    body = f"g ({IMAGE}) => (float[N,16,8,8] y) {{ [l] y = Conv (x, w, b) }}"
    found = {}
    for big in (1.0, 1e7):
        bias = np.ones(16, np.float32)
        bias[4] = big
        workspace = workspace_of(parse(body, weights | {"b": bias}), feeds("conv"))
        plan, _ = apply_step(workspace, replace(PLAIN, rounder=AdaRound()))
        (codes,) = plan.weight_codes.values()
        found[big] = codes
    same = np.arange(16) != 4
    np.testing.assert_array_equal(found[1.0].codes[same], found[1e7].codes[same])
    assert found[1e7].params.scale[4] > found[1.0].params.scale[4]
    assert found[1e7].rounder == "adaround"


def test_few_rows_do_not_make_other_inputs_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 21 rows of 64 nearly independent inputs there is nothing to learn; what seems so is held back."""
    proto = parse("g (float[N,64] x) => (float[N,48] y) { y = MatMul (x, w) }", weights_of(5, w=(64, 48)))
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float64)
    rng = np.random.default_rng(0)
    samples: list[Feed] = [{"x": rng.standard_normal((7, 64)).astype(np.float32)} for _ in range(3)]
    ratios = []
    for share in (0.0, rounding._SHRINK):
        monkeypatch.setattr(rounding, "_SHRINK", share)
        errors = []
        for rounder in (ROUNDERS["rtn"](), AdaRound()):
            plan, _ = apply_step(workspace_of(proto, samples), replace(PLAIN, rounder=rounder))
            (codes,) = plan.weight_codes.values()
            errors.append(
                ((weight - dequantize(codes.codes, codes.params)) ** 2).sum()
            )  # the inputs are white
        ratios.append(errors[1] / errors[0])
    assert ratios[0] > 1.5
    assert ratios[1] < 1.3
