"""KV smoothing: keys hand their magnitude to the queries."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from calib.model import open_model
from tests.graph.models import parse
from tests.models import weights_of
from tests.steps.layers import workspace_of
from tests.steps.smoothing_models import attention_model, feeds, smoothed, tensors, unchanged
from tools.bench.outliers import llama_block, llama_feeds


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_kv_smooth(factor: float) -> None:
    model = attention_model()
    (keys,) = tensors(open_model(model), ["k1"], feeds())
    workspace = workspace_of(model, feeds())
    (found,) = smoothed(workspace, "kv_smooth", smooth_factor=factor)
    np.testing.assert_allclose(found.scale, np.abs(keys).max(0) ** factor, rtol=1e-5)
    assert set(found.nodes) == {"k_proj", "k_bias", "q_proj", "q_bias"}
    after = np.abs(tensors(workspace.model(), ["k1"], feeds())[0]).max(0)
    np.testing.assert_allclose(after, np.abs(keys).max(0) ** (1 - factor), rtol=1e-4)
    unchanged(model, workspace, feeds())


def test_kv_smooth_leaves_a_cache_alone() -> None:
    model = attention_model()
    model.graph.output.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, None))
    assert smoothed(workspace_of(model, feeds()), "kv_smooth") == []
    assert smoothed(workspace_of(attention_model(), feeds()), "kv_smooth", exclude=["q_proj"]) == []


def test_turned_keys_share_the_scales_of_their_pairs() -> None:
    """Rotary embeddings mix channels i and i + 8 of a head of 16: one scale for both; 2 key heads, 4 query heads."""
    model, data = llama_block(), llama_feeds(4)
    (keys,) = tensors(open_model(model), ["k_proj.out"], data)
    workspace = workspace_of(model, data)
    (found,) = smoothed(workspace, "kv_smooth")
    size = np.abs(keys).max(0).reshape(2, 2, 8)
    np.testing.assert_allclose(found.scale, size.max(axis=1).reshape(-1), rtol=1e-5)
    assert set(found.nodes) == {"k_proj", "q_proj"}
    unchanged(model, workspace, data)


def test_rotary_embeddings_that_leave_nothing_out() -> None:
    """Exporters write x[..., :size] and x[..., size:] also where the second part is empty (Phi-3)."""
    weights = {name: value / 3 for name, value in weights_of(1, wq=(8, 8), wk=(8, 8), wv=(8, 8)).items()}
    ends = {
        "zero": np.array([0]),
        "size": np.array([8]),
        "end": np.array([2**31 - 1]),
        "last": np.array([-1]),
    }
    parts = "".join(
        f"{x}_r = Slice ({x}0, zero, size, last)  {x}_n = Neg ({x}_r)  {x}_p = Slice ({x}0, size, end, last)  "
        f"{x} = Concat <axis = -1> ({x}_n, {x}_p)  "
        for x in "qk"
    )
    body = f"""g (float[N,6,8] x) => (float[N,6,8] y) {{
      [q_proj] q0 = MatMul (x, wq)  [k_proj] k0 = MatMul (x, wk)  v = MatMul (x, wv)  {parts}
      t = Transpose <perm = [0, 2, 1]> (k)  s = MatMul (q, t)  p = Softmax <axis = -1> (s)  y = MatMul (p, v) }}"""
    model = parse(body, {**weights, **ends}, 17)
    data = [{"x": np.random.default_rng(i).normal(size=(2, 6, 8)).astype(np.float32)} for i in range(4)]
    workspace = workspace_of(model, data)
    (found,) = smoothed(workspace, "kv_smooth")
    assert set(found.nodes) == {"k_proj", "q_proj"}
    unchanged(model, workspace, data)
