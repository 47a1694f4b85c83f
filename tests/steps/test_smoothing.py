"""What all smoothing steps share: the float function stays, which groups they touch, what the main job makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.model import open_model
from onnxslim_ptq import quantize
from onnxslim_ptq.steps import STEPS
from onnxslim_ptq.workspace import Workspace
from tests.models import feeds_for, mlp
from tests.steps.layers import workspace_of
from tests.steps.smoothing_models import Matrix, feeds, norm_model, smoothed, tensors, unchanged
from tools import zoo
from tools.bench.outliers import PLAIN, compare_recipes, llama_block, llama_feeds, with_outliers


@pytest.fixture
def workspace() -> Workspace:
    return workspace_of(norm_model(), feeds())


@pytest.mark.parametrize("kind", [k for k in STEPS if k not in ("equalize", "kv_smooth")])
@pytest.mark.parametrize("source", ["norm", "llama"])
def test_the_float_function_stays(kind: str, source: str) -> None:
    """Also with grouped queries, where several query heads share the scale of one value head."""
    model, data = (norm_model(), feeds()) if source == "norm" else (llama_block(), llama_feeds(4))
    workspace = workspace_of(model, data)
    found = smoothed(workspace, kind)
    if kind not in ("auto_smooth", "split_outliers"):  # these may find nothing worth doing
        assert found
    for group in found:
        assert np.isfinite(group.scale).all()
        assert (group.scale > 0).all()
    unchanged(model, workspace, data)


def test_grouped_queries_share_their_scale() -> None:
    """iter_smooth takes the mean of A and W over the query heads of one value head, smoothquant the largest."""
    data = llama_feeds(4)
    model = open_model(llama_block())
    act = np.abs(tensors(model, ["joined.out"], data)[0]).max(0).astype(np.float64)
    weight = np.abs(model.weights["o_proj.weight"]).max(1).astype(np.float64)
    heads = np.arange(64).reshape(4, 16)
    shared = [
        np.concatenate([heads[2 * i : 2 * i + 2]]) for i in range(2)
    ]  # [2 query heads, 16] of each value head
    reduced: dict[Callable[..., Any], tuple[Matrix, Matrix]] = {
        how: tuple(np.concatenate([how(v[s], axis=0) for s in shared]) for v in (act, weight))  # type: ignore[misc]
        for how in (np.mean, np.max)
    }
    for kind, how, alpha in (("iter_smooth", np.mean, 0.9), ("smoothquant", np.max, 0.5)):
        (found,) = smoothed(workspace_of(llama_block(), data), kind, groups=["ov"])
        a, w = reduced[how]
        np.testing.assert_allclose(found.scale, a**alpha / w ** (1 - alpha), rtol=1e-5)


class TestGroups:
    def test_kinds(self) -> None:
        workspace = workspace_of(llama_block(), llama_feeds(3))
        assert [f.kind for f in smoothed(workspace, "smoothquant", groups=["up-down"])] == ["up-down"]

    def test_excluded_as_a_whole(self, workspace: Workspace) -> None:
        assert smoothed(workspace, "smoothquant", exclude=["a"]) == []

    def test_one_included_layer_is_enough(self, workspace: Workspace) -> None:
        (found,) = smoothed(workspace, "smoothquant", include=["b"])
        assert found.nodes == ("a", "b")

    def test_float_layers_are_left_alone(self) -> None:
        recipe = {
            "steps": [{"type": "smoothquant"}, {"type": "quantize", "include": ["gate", "up"]}],
        }
        result = quantize(llama_block(), recipe, llama_feeds(4))
        notes = [n for n in result.notes if "scaled" in n]
        assert notes == ["smoothquant scaled 1 norm-linear groups"]

    def test_a_step_that_finds_nothing_says_so(self) -> None:
        recipe = {
            "steps": [{"type": "awq", "groups": ["conv-conv"]}, {"type": "smoothquant"}, {"type": "quantize"}]
        }
        notes = quantize(llama_block(), recipe, llama_feeds(4)).notes
        assert "awq scaled nothing: no group of quantized layers suits it; see inspect --groups" in notes
        assert not any(note.startswith("smoothquant scaled nothing") for note in notes)


class TestMainJob:
    def test_outliers(self) -> None:
        """The same function with channels a hundred times larger: smoothing does not notice, plain collapses."""
        recipes = {
            "plain": PLAIN,
            **{n: n for n in ("w8a8", "w8a8-smoothquant", "w8a8-m4", "w8a8-transformer")},
        }
        found = compare_recipes(llama_block(), llama_feeds(16), llama_feeds(4, seed=9), recipes)
        plain = found.pop("plain")
        assert plain[1] < plain[0] - 10
        for name, (untouched, altered) in found.items():
            assert altered > untouched - 0.5, name
            assert altered > plain[1] + 6, name
        (m6,) = compare_recipes(
            llama_block(), llama_feeds(16), llama_feeds(4, seed=9), {"m6": "w8a8-m6"}
        ).values()
        assert m6[1] > m6[0] - 1

    def test_outliers_keep_the_function(self) -> None:
        data = llama_feeds(2)
        before, after = (
            tensors(open_model(m), ["y"], data)[0] for m in (llama_block(), with_outliers(llama_block()))
        )
        np.testing.assert_allclose(after, before, atol=1e-5 * float(np.abs(before).max()))

    def test_the_json_tells_what_was_scaled(self, tmp_path: Path) -> None:
        paths = quantize(llama_block(), "w8a8-m4", llama_feeds(4)).save(tmp_path / "m.onnx")
        entries = json.loads(paths.json.read_text())["smoothing"]
        assert [(e["step"], e["kind"], e["group"]) for e in entries] == [
            ("iter_smooth", "norm-linear", ["q_proj", "k_proj", "v_proj"]),
            ("iter_smooth", "ov", ["o_proj"]),
            ("iter_smooth", "norm-linear", ["gate", "up"]),
            ("iter_smooth", "up-down", ["down"]),
        ]
        assert [len(e["scale"]) for e in entries] == [64, 32, 64, 160]

    def test_what_fits_few_samples_only_is_left(self) -> None:
        """Scales that even out 40 rows clip others: candidates are judged on samples they were not made from."""
        results = [quantize(mlp(), r, feeds_for(mlp()), target="tensorrt") for r in ("w8a8", PLAIN)]
        assert results[0].metrics["sqnr_db"] >= results[1].metrics["sqnr_db"] - 0.5

    def test_models_without_groups_are_as_before(self) -> None:
        plain = quantize("tools/digits/digits.onnx", PLAIN, "tools/digits/calib")
        smooth = quantize("tools/digits/digits.onnx", "w8a8", "tools/digits/calib")
        assert smooth.model.SerializeToString() == plain.model.SerializeToString()

    @pytest.mark.network
    def test_minilm(self) -> None:
        try:
            case = zoo.load("minilm")
        except zoo.ZooUnavailable as reason:
            pytest.skip(str(reason))
        data = [case.calibration[i] for i in range(0, 64, 8)]
        measured = [case.evaluation[i] for i in (0, 20, 40)]
        results = {
            name: quantize(case.model, recipe, data, eval_data=measured).metrics["sqnr_db"]
            for name, recipe in (("plain", PLAIN), ("transformer", "w8a8-transformer"))
        }
        assert results["transformer"] > results["plain"] + 1.5
