"""KV smoothing: keys hand their magnitude to the queries."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from calib.model import open_model
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
