"""`quantize`: exit codes, what is written, what is said, on a small trained network."""

from __future__ import annotations

import json
import os
import shlex
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxslim_ptq.cli import main

DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits"
MODEL, CALIB = str(DIGITS / "digits.onnx"), str(DIGITS / "calib")
Captured = pytest.CaptureFixture[str]


def run_json(capsys: Captured, *args: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the document; fails when stdout holds anything else."""
    code = main([*args, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", [["quantize"], []], ids=["command", "short form"])
def test_writes_the_model_and_says_what_matters(form: list[str], tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "made" / "small.onnx"
    assert main([*form, MODEL, str(out), "--calib", CALIB]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    assert sorted(p.name for p in out.parent.iterdir()) == ["small.json", "small.onnx"]
    assert "x smaller" in text
    assert "layers: 10 quantized, 0 float" in text
    assert "dB SQNR, cosine 0.99" in text
    assert "held-out samples" in text
    assert f"next: onnxslim-ptq compare {MODEL} {out} --calib {CALIB}" in text
    assert len(text.splitlines()) <= 10


def test_options_may_come_first(tmp_path: Path) -> None:
    assert main(["--calib", CALIB, "-q", MODEL, str(tmp_path / "m.onnx")]) == 0


def test_a_folder_as_out(tmp_path: Path, capsys: Captured) -> None:
    code, document = run_json(capsys, MODEL, str(tmp_path / "folder"), "--calib", CALIB, "--external-data")
    assert code == 0
    names = sorted(Path(p).name for p in document["files"].values())
    assert names == ["digits_w8a8.json", "digits_w8a8.onnx", "digits_w8a8.onnx.data"]
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == names


def test_json_is_pure_and_complete(tmp_path: Path, capsys: Captured) -> None:
    code, document = run_json(
        capsys,
        "quantize",
        MODEL,
        str(tmp_path / "m.onnx"),
        "--calib",
        CALIB,
        "--exclude",
        "op:Gemm",
        "--target",
        "generic",
    )
    assert code == document["exit_code"] == 0
    assert document["target"] == "generic"
    assert document["layers"]["float"] == {"/fc/Gemm": "excluded by pattern 'op:Gemm'"}
    assert len(document["layers"]["quantized"]) == 9
    assert document["metrics"]["measured_on"] == "held-out"
    assert document["bytes"]["quantized"] < document["bytes"]["float"]


def test_float_layers_carry_their_reason(tmp_path: Path, capsys: Captured) -> None:
    assert main([MODEL, str(tmp_path / "m.onnx"), "--calib", CALIB, "--exclude", "*block?*", "-v"]) == 0
    text = capsys.readouterr().out
    assert "layers: 4 quantized, 6 float" in text
    assert text.count("excluded by pattern '*block?*'") == 6  # -v: each one


def test_quiet_says_nothing(tmp_path: Path, capsys: Captured) -> None:
    assert main([MODEL, str(tmp_path / "m.onnx"), "--calib", CALIB, "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_without_data_it_says_so(tmp_path: Path, capsys: Captured) -> None:
    code, document = run_json(capsys, MODEL, str(tmp_path / "m.onnx"))
    assert code == 0
    assert document["metrics"]["measured_on"] == "synthetic"
    assert main([MODEL, str(tmp_path / "m.onnx"), "--range", "image:0,1", "--samples", "3"]) == 0
    text, errors = capsys.readouterr()
    assert "synthetic samples (random numbers), not from real data" in errors
    assert "on 3 synthetic samples, not real data" in text


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main([MODEL, str(tmp_path / name / "m.onnx"), "--calib", CALIB, "-q"]) == 0
    for name in ("m.onnx", "m.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o640), (0o077, 0o600)])
def test_files_are_not_open_to_everybody(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        assert main([MODEL, str(tmp_path / "m.onnx"), "--calib", CALIB, "-q"]) == 0
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {mode}


BAD = {
    "no such model": (["missing.onnx", "OUT", "--calib", CALIB], 2, "model 'missing.onnx' does not exist"),
    "not a model": ([str(DIGITS / "train.py"), "OUT", "--calib", CALIB], 2, "not a valid ONNX model"),
    "no such data": ([MODEL, "OUT", "--calib", "missing"], 2, "no such file or folder"),
    "no such recipe": ([MODEL, "OUT", "--calib", CALIB, "--recipe", "w8a9"], 2, "did you mean 'w8a8'?"),
    "pattern matches nothing": (
        [MODEL, "OUT", "--calib", CALIB, "--exclude", "*hed*"],
        2,
        "nearest: '/head/head.0/Conv'",
    ),
    "weights only on Ascend": (
        [MODEL, "OUT", "--calib", CALIB, "--target", "ascend", "--recipe", "w8a16"],
        2,
        "target 'ascend' takes static activations",
    ),
    "unknown target": ([MODEL, "OUT", "--calib", CALIB, "--target", "gpu"], 2, "target 'gpu' is unknown"),
    "unknown nan": ([MODEL, "OUT", "--calib", CALIB, "--nan", "x"], 2, "nan: 'x' is unknown"),
    "unknown reduce-range": (
        [MODEL, "OUT", "--calib", CALIB, "--reduce-range", "x"],
        2,
        "use auto, on or off",
    ),
    "unknown device": (
        [MODEL, "OUT", "--calib", CALIB, "--device", "tpu"],
        2,
        "use cpu, npu[:ID] or cuda[:ID]",
    ),
    "min-sqnr": ([MODEL, "OUT", "--calib", CALIB, "--min-sqnr", "nan"], 2, "a number of dB"),
    "samples": ([MODEL, "OUT", "--calib", CALIB, "--samples", "0"], 2, "--samples"),
    "shape": ([MODEL, "OUT", "--shape", "image"], 2, "expected NAME:DIMxDIMx"),
    "shape with data": (
        [MODEL, "OUT", "--calib", CALIB, "--shape", "image:1x1x8x8"],
        2,
        "leave them out with --calib",
    ),
    "stacked without data": ([MODEL, "OUT", "--stacked"], 2, "--calib or --eval"),
    "quiet and verbose": ([MODEL, "OUT", "-q", "-v"], 2, "exclude each other"),
    "no OUT": ([MODEL], 2, "OUT"),
    "too many": ([MODEL, "OUT", "third"], 2, "third"),
    "unknown option": ([MODEL, "OUT", "--calb", CALIB], 2, "--calib"),
    "below min-sqnr": ([MODEL, "OUT", "--calib", CALIB, "--min-sqnr", "200"], 3, "below --min-sqnr 200"),
    "npu": ([MODEL, "OUT", "--calib", CALIB, "--device", "npu"], 4, "'npu' is not available"),
    "npu with id": ([MODEL, "OUT", "--calib", CALIB, "--device", "npu:1"], 4, "'npu:1' is not available"),
    "cuda": ([MODEL, "OUT", "--calib", CALIB, "--device", "cuda"], 4, "'cuda' is not available"),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line_and_leave_nothing(
    case: str, as_json: bool, tmp_path: Path, capsys: Captured
) -> None:
    given, code, message = BAD[case]
    out = tmp_path / "made" / "out.onnx"
    args = [str(out) if a == "OUT" else a for a in given]
    assert main([*args, "--json"] if as_json else args) == code
    text, errors = capsys.readouterr()
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert message in errors
    if as_json:
        document = json.loads(text)
        assert document["exit_code"] == code
        assert message in document["error"]
    else:
        assert text == ""
    assert list(tmp_path.iterdir()) == []


def test_weights_beside_the_model(tmp_path: Path) -> None:
    assert main([MODEL, str(tmp_path / "m.onnx"), "--calib", CALIB, "--weights", "-q"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "m.onnx", "m.json", "quant_model_weight_w8a8.safetensors", "quant_model_description_w8a8.json"
    }  # fmt: skip


def test_a_report_needs_a_result(tmp_path: Path, capsys: Captured) -> None:
    assert main([MODEL, str(tmp_path / "m.onnx"), "--calib", CALIB, "--report", "r.html", "--dry-run"]) == 2
    assert "--report shows a result, and --dry-run makes none" in capsys.readouterr().err


def test_the_summary_names_the_worst_layers(tmp_path: Path, capsys: Captured) -> None:
    """Also of a good result, with the options that leave them float."""
    arguments = [MODEL, str(tmp_path / "m.onnx"), "--calib", CALIB]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("worst layers alone: /block1/"))
    options = shlex.split(lines[at + 1].partition("add ")[2])
    assert options.count("--exclude") == 3
    assert main([*arguments, *options]) == 0
    assert "excluded by pattern" in capsys.readouterr().out


def test_the_input_is_never_written_over(tmp_path: Path, capsys: Captured) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(Path(MODEL).read_bytes())
    link = tmp_path / "link.onnx"
    link.symlink_to(model)
    for out in (model, link):
        for more in ([], ["--dry-run"]):
            assert main([str(model), str(out), "--calib", CALIB, *more]) == 2
            assert "is the same file as the input" in capsys.readouterr().err
    assert model.read_bytes() == Path(MODEL).read_bytes()


def test_a_failed_run_keeps_the_old_result(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    out.write_bytes(b"old")
    assert main([MODEL, str(out), "--calib", CALIB, "--min-sqnr", "200"]) == 3
    assert out.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_dry_run_writes_nothing(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "made" / "m.onnx"
    assert main([MODEL, str(out), "--calib", CALIB, "--dry-run", "--exclude", "op:Gemm"]) == 0
    text = capsys.readouterr().out
    assert "9 would be quantized (9 Conv), 1 float" in text
    assert "excluded by pattern 'op:Gemm': /fc/Gemm" in text
    assert f"would write: {out}, {out.with_suffix('.json')}" in text
    assert list(tmp_path.iterdir()) == []


def test_dry_run_agrees_with_the_real_run(tmp_path: Path, capsys: Captured) -> None:
    args = (MODEL, str(tmp_path / "m.onnx"), "--calib", CALIB, "--exclude", "*depthwise*")
    _, planned = run_json(capsys, *args, "--dry-run")
    _, done = run_json(capsys, *args)
    assert sorted(planned["layers"]["quantized"]) == done["layers"]["quantized"]
    assert planned["layers"]["float"] == done["layers"]["float"]
    assert sorted(planned["files"]) == sorted(done["files"].values())


@pytest.mark.parametrize(
    "given", [["--target", "ascent"], ["--recipe", "x"], ["--calib", "missing"], ["--exclude", "*hed*"]]
)
def test_dry_run_finds_mistakes(given: list[str], tmp_path: Path) -> None:
    assert main([MODEL, str(tmp_path / "m.onnx"), "--dry-run", *given]) == 2


def test_a_doubtful_result_names_the_worst_layers(tmp_path: Path, capsys: Captured) -> None:
    recipe = tmp_path / "harsh.yaml"
    recipe.write_text(
        "steps:\n  - {type: quantize, bias_correction: false, act: {range: {type: percentile, percentile: 96}}}\n"
    )
    out = tmp_path / "m.onnx"
    code, document = run_json(
        capsys, MODEL, str(out), "--calib", CALIB, "--recipe", str(recipe), "--min-sqnr", "0"
    )
    assert code == 0
    assert document["metrics"]["sqnr_db"] < 12
    assert "output 'logits' reaches only" in document["warnings"][0]
    assert document["warnings"][0].count(" dB)") == 3


def test_a_quantized_model_is_refused(tmp_path: Path, capsys: Captured) -> None:
    once = tmp_path / "once.onnx"
    assert main([MODEL, str(once), "--calib", CALIB, "-q"]) == 0
    assert main([str(once), str(tmp_path / "twice.onnx"), "--calib", CALIB]) == 2
    assert "already quantized" in capsys.readouterr().err


def test_nan_in_the_data(tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(4):
        np.savez(
            folder / f"{index}.npz", image=np.full((1, 1, 8, 8), np.nan if index == 2 else 0.5, np.float32)
        )
    assert main([MODEL, str(tmp_path / "m.onnx"), "--calib", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "2.npz" in error
    assert "--nan ignore" in error


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: Captured) -> None:
    model = onnx.load(MODEL)
    model.graph.node[0].name = "bad\x1b[31mname"
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    assert main([str(path), str(tmp_path / "o.onnx"), "--calib", CALIB, "--exclude", "bad*", "-v"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "bad\\x1b[31mname" in text


def test_the_target_of_the_command_line_judges_the_recipe(tmp_path: Path, capsys: Captured) -> None:
    """4-bit weights go with per-token activations off the cpu only, whatever target the recipe names."""
    recipe = tmp_path / "a8w4.yaml"
    recipe.write_text(
        "target: generic\n"
        "steps:\n  - {type: quantize, weight: {dtype: int4}, act: {per: token, when: dynamic}}\n"
    )
    arguments = [MODEL, str(tmp_path / "m.onnx"), "--calib", CALIB, "--recipe", str(recipe), "--dry-run"]
    assert main(arguments) == 0
    assert main([*arguments, "--target", "cpu"]) == 2
    assert "steps[0].weight: integer kernels take symmetric int8 weights" in capsys.readouterr().err
