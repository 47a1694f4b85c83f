"""`tune`."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort
import pytest
import yaml

from onnxslim_ptq import Recipe, quantize
from onnxslim_ptq.cli import main
from onnxslim_ptq.errors import RecipeError
from onnxslim_ptq.tuning import tune
from onnxslim_ptq.tuning.changes import CHANGES
from tests.graph.models import embedded, model_of
from tests.models import feeds_for, weights_of

DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits"
MODEL, CALIB = str(DIGITS / "digits.onnx"), str(DIGITS / "calib")
Captured = pytest.CaptureFixture[str]


def test_a_goal_that_needs_float_layers(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "t.onnx"
    arguments = ["tune", MODEL, str(out), "--calib", CALIB, "--goal", "sqnr>=38", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["met"]
    assert found["best"]["sqnr"] >= 38
    assert 0 < found["best"]["int8_macs"] < 1
    assert found["best"]["label"] in found["pareto"] or len(found["pareto"]) > 0
    recipe = yaml.safe_load(out.with_name("t.recipe.yaml").read_text())
    again = quantize(MODEL, Recipe.load(recipe), CALIB)
    assert again.metrics["sqnr_db"] == pytest.approx(found["best"]["sqnr"])
    ort.InferenceSession(out, providers=["CPUExecutionProvider"])

    assert main(arguments) == 0, "the same command again finds all trials in the history"
    second = json.loads(capsys.readouterr().out)
    assert second["resumed"] == len(second["trials"]) == len(found["trials"])
    assert second["best"] == found["best"]


def test_a_goal_that_is_met_at_once(tmp_path: Path, capsys: Captured) -> None:
    assert main(["tune", MODEL, str(tmp_path / "t.onnx"), "--calib", CALIB, "--goal", "top1_agree>=0.9"]) == 0
    text = capsys.readouterr().out
    assert "goal top1_agree>=0.9 met" in text
    assert "*>  the recipe" in text


def test_a_goal_out_of_reach(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "t.onnx"
    assert main(["tune", MODEL, str(out), "--calib", CALIB, "--goal", "sqnr>=38", "--max-time", "0.1"]) == 5
    text, errors = capsys.readouterr()
    assert "MISSED" in text
    assert "the time was up" in errors
    assert not out.exists()
    assert sorted(p.name for p in (tmp_path / "t.onnx.best").iterdir()) == [
        "digits_w8a8.json",
        "digits_w8a8.onnx",
        "digits_w8a8.recipe.yaml",
    ]


@pytest.mark.slow
def test_a_metric_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """The evaluator gets the path of a written model; its answer decides."""
    (tmp_path / "mine.py").write_text(
        "import onnx\n"
        "def floats(path):\n"
        "    model = onnx.load(path)\n"
        "    made = {o for n in model.graph.node if n.op_type == 'DequantizeLinear' for o in n.output}\n"
        "    return sum(n.op_type == 'Conv' and n.input[1] not in made for n in model.graph.node)\n"
    )
    monkeypatch.chdir(tmp_path)
    out = str(tmp_path / "t.onnx")
    arguments = [
        "tune",
        MODEL,
        out,
        "--calib",
        CALIB,
        "--goal",
        "metric>=2",
        "--evaluator",
        "mine:floats",
        "--json",
    ]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["metric"] >= 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--goal", "sqnr"], 'write METRIC>=NUMBER, such as "sqnr>=30"'),
        (["--goal", "metric>=1"], "metric is what an evaluator returns; give both or neither"),
        (["--goal", "metric>=1", "--evaluator", "nothing"], "write MODULE:FUNCTION"),
        (["--goal", "metric>=1", "--evaluator", "no_such_module:f"], "cannot be imported"),
        (["--goal", "metric>=1", "--evaluator", "json:nothing"], "has no function 'nothing'"),
        (["--goal", "sqnr>=1", "--recipe", "nonsense"], "nonsense"),
    ],
)
def test_errors(more: list[str], message: str, tmp_path: Path, capsys: Captured) -> None:
    assert main(["tune", MODEL, str(tmp_path / "t.onnx"), "--calib", CALIB, *more]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_input_is_refused_before_the_search(tmp_path: Path, capsys: Captured) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(Path(MODEL).read_bytes())
    assert main(["tune", str(model), str(model), "--calib", CALIB, "--goal", "sqnr>=30"]) == 2
    assert "is the same file as the input" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"], "no history: no trial was made"


def test_a_metric_that_is_not_a_number_is_the_worst_of_all() -> None:
    found = tune(MODEL, "metric>=1", CALIB, samples=8, evaluator=lambda _: float("nan"), max_time=0.1)
    assert not found.met
    assert str(found.best.measures["metric"]) == "nan"


def test_a_goal_that_no_output_can_show() -> None:
    """Top-1 of a model without rows: not met at once, but an error."""
    proto = embedded(
        model_of("g (float[1,8] x) => (float[1,1] y) { y = MatMul (x, w) }", weights_of(1, w=(8, 1)))
    )
    with pytest.raises(RecipeError, match="no output of the model can be judged by top1_agree"):
        tune(proto, "top1_agree>=0.5", feeds_for(proto))


def test_a_target_that_does_not_run_here(tmp_path: Path, capsys: Captured) -> None:
    """Ascend: verified as ever, but neither tune nor compare tells a latency."""
    out = tmp_path / "t.onnx"
    arguments = ["--calib", CALIB, "--json"]
    assert main(["tune", MODEL, str(out), "--goal", "sqnr>=20", "--target", "ascend", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["latency"] is None
    assert main(["compare", MODEL, str(out), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["latency"] is None


@pytest.mark.parametrize(
    "command", [["tune", MODEL, "o.onnx", "--goal", "sqnr>=20"], ["analyze", "linear", MODEL]]
)
def test_stacked_without_files(command: list[str], capsys: Captured) -> None:
    assert main([*command, "--stacked"]) == 2
    assert "--stacked describes the files of --calib or --eval" in capsys.readouterr().err


def test_explicit_smoothing_replaces_the_recipes_own() -> None:
    """By the `auto_smooth` of `w8a8-transformer` alone, wherever that stands there."""
    own = Recipe.load("w8a8").dump()
    changed = CHANGES["explicit smoothing"](own)
    assert changed is not None
    (smoothing, *rest) = changed["steps"]
    assert smoothing["type"] == "auto_smooth"
    assert "unfused" in smoothing["groups"]
    assert rest == own["steps"][1:]


def test_without_data_it_says_so(tmp_path: Path, capsys: Captured) -> None:
    assert main(["tune", MODEL, str(tmp_path / "t.onnx"), "--goal", "sqnr>=1"]) == 0
    assert "activation ranges come from synthetic samples" in capsys.readouterr().err
