"""From a float model to verified files: accuracy on a trained network, every target, the same bytes every time."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from calib.progress import Progress
from calib.types import Feed
from onnxslim_ptq import quantize
from onnxslim_ptq.errors import DeviceError, GraphError, RecipeError, VerificationError
from tests.models import cnn, feeds_for, mlp, outputs_of, quantized, session_of, sqnr_of

DIGITS = Path(__file__).parents[2] / "tools" / "digits"
TARGETS = ["cpu", "generic", "tensorrt", "openvino"]


@pytest.fixture(scope="module")
def digits() -> list[Feed]:
    feeds: list[Feed] = []
    for path in sorted((DIGITS / "calib").glob("*.npz")):
        with np.load(path, allow_pickle=False) as sample:
            feeds.append({"image": sample["image"]})
    return feeds


@pytest.fixture(scope="module")
def held_out() -> tuple[np.ndarray, np.ndarray]:
    with np.load(DIGITS / "eval.npz", allow_pickle=False) as data:
        return data["image"], data["label"]


class TestDigits:
    @pytest.mark.parametrize("target", TARGETS)
    def test_accuracy(self, target: str, digits: list[Feed], held_out: tuple[np.ndarray, np.ndarray]) -> None:
        """450 images nobody calibrated on: at most one answer lost, and a floor for the logits."""
        images, labels = held_out
        result = quantize(DIGITS / "digits.onnx", calib_data=digits, target=target)
        assert result.skipped == {}
        answers = [
            outputs_of(m, [{"image": images}]) for m in (onnx.load(DIGITS / "digits.onnx"), result.model)
        ]
        right = [int((a[0][0].argmax(axis=1) == labels).sum()) for a in answers]
        assert right[1] >= right[0] - 1
        measured = sqnr_of(*answers)
        assert measured > 22
        assert result.metrics["sqnr_db"] == pytest.approx(measured, abs=6), (
            "what it claims is what strangers measure"
        )
        assert result.metrics["measured_on"] == "held-out"
        assert result.context.calibration.samples == 56

    def test_files(self, digits: list[Feed], tmp_path: Path) -> None:
        """The saved model loads in a plain onnxruntime and answers like the model in memory; the JSON is valid."""
        result = quantize(DIGITS / "digits.onnx", calib_data=digits)
        paths = result.save(tmp_path / "out.onnx")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.onnx"]
        session = ort.InferenceSession(paths.model, providers=["CPUExecutionProvider"])
        want = session_of(result.model).run(None, dict(digits[0]))
        np.testing.assert_array_equal(session.run(None, dict(digits[0]))[0], want[0])
        onnx.checker.check_model(paths.model, full_check=True)
        document = json.loads(paths.json.read_text())
        schema = json.loads(
            resources.files("onnxslim_ptq.export").joinpath("weights.schema.json").read_text()
        )
        jsonschema.validate(document, schema)
        assert document["metrics"]["sqnr_db"] == result.metrics["sqnr_db"]
        assert document["source"]["file"] == "digits.onnx"
        assert (paths.model.stat().st_size) < 0.5 * (DIGITS / "digits.onnx").stat().st_size

    def test_json_describes_the_model(self, digits: list[Feed], tmp_path: Path) -> None:
        """Dequantizing by the JSON alone gives the weights that the model file computes with."""
        paths = quantize(DIGITS / "digits.onnx", calib_data=digits).save(tmp_path)
        assert paths.model.name == "digits_w8a8.onnx"
        document = json.loads(paths.json.read_text())
        tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(paths.model).graph.initializer}
        readers = {
            n.input[0]: n for n in onnx.load(paths.model).graph.node if n.op_type == "DequantizeLinear"
        }
        assert document["weights"]
        for entry in document["weights"].values():
            node = readers[entry["quantized_name"]]
            np.testing.assert_array_equal(
                tensors[node.input[1]].reshape(-1), np.asarray(entry["scale"], np.float32)
            )
            assert list(tensors[entry["quantized_name"]].shape) == entry["shape"]
        for name, entry in document["activations"].items():
            node = next(
                n
                for n in onnx.load(paths.model).graph.node
                if n.op_type == "QuantizeLinear" and n.input[0] in (name, f"{name}_float")
            )
            assert (
                tensors[node.input[1]].reshape(-1).tolist() == np.asarray(entry["scale"], np.float32).tolist()
            )

    def test_two_runs_give_the_same_bytes(self, digits: list[Feed], tmp_path: Path) -> None:
        files = []
        for name in ("first", "second"):
            paths = quantize(DIGITS / "digits.onnx", calib_data=digits).save(tmp_path / name / "m.onnx")
            files.append((paths.model.read_bytes(), paths.json.read_bytes()))
        assert files[0] == files[1]

    def test_in_another_process_too(self, digits: list[Feed], tmp_path: Path) -> None:
        """Hash seeds and thread counts differ there."""
        code = (
            "import glob, sys, numpy as np; from onnxslim_ptq import quantize\n"
            f"files = sorted(glob.glob({str(DIGITS / 'calib' / '*.npz')!r}))\n"
            "feeds = [{'image': np.load(p)['image']} for p in files]\n"
            f"quantize({str(DIGITS / 'digits.onnx')!r}, calib_data=feeds, threads=1).save(sys.argv[1])\n"
        )
        there = tmp_path / "there.onnx"
        subprocess.run(
            [sys.executable, "-c", code, there],
            check=True,
            cwd=DIGITS.parents[1],
            env={"PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(DIGITS.parents[1])},
        )
        here = quantize(DIGITS / "digits.onnx", calib_data=digits, threads=1).save(tmp_path / "here.onnx")
        assert there.read_bytes() == here.model.read_bytes()
        assert there.with_suffix(".json").read_bytes() == here.json.read_bytes()


class TestTargets:
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("make", [cnn, mlp])
    def test_every_target(self, make: object, target: str, tmp_path: Path) -> None:
        proto = make()  # type: ignore[operator]
        result = quantized(proto, target=target)
        assert result.metrics["sqnr_db"] > 40
        paths = result.save(tmp_path / "m.onnx")
        feeds = feeds_for(proto, 4, seed=5)
        assert sqnr_of(outputs_of(proto, feeds), outputs_of(onnx.load(paths.model), feeds)) > 38

    def test_a_recipe_chooses_and_the_argument_overrides(self) -> None:
        recipe = {"target": "tensorrt", "steps": [{"type": "quantize"}]}
        assert quantized(mlp(), recipe=recipe).context.target == "tensorrt"
        assert quantized(mlp(), recipe=recipe, target="generic").context.target == "generic"

    def test_ascend_takes_signed_activations_only(self) -> None:
        recipe = {"steps": [{"type": "quantize", "act": {"dtype": "uint8"}}]}
        with pytest.raises(
            RecipeError, match=r"steps\[0\].act.dtype: target 'ascend' takes int8 activations"
        ):
            quantized(mlp(), recipe=recipe, target="ascend")

    def test_tensorrt_takes_symmetric_int8_only(self) -> None:
        for act in ({"symmetric": False}, {"dtype": "uint8"}):
            with pytest.raises(RecipeError, match=r"steps\[0\].act: target 'tensorrt' takes symmetric int8"):
                quantized(mlp(), recipe={"steps": [{"type": "quantize", "act": act}]}, target="tensorrt")
        weights = {"type": "quantize", "act": None, "weight": {"symmetric": False}}
        with pytest.raises(
            RecipeError, match=r"steps\[0\].weight.symmetric: target 'tensorrt' takes symmetric"
        ):
            quantized(mlp(), recipe={"steps": [weights]}, target="tensorrt")


class TestArguments:
    def test_wrong_ones(self) -> None:
        for options, error, text in [
            ({"target": "tpu"}, RecipeError, "target 'tpu' is unknown; use one of cpu, generic"),
            ({"nan": "drop"}, RecipeError, "nan: 'drop' is unknown"),
            ({"reduce_range": "yes"}, RecipeError, "reduce_range: 'yes' is unknown"),
            ({"device": "tpu"}, DeviceError, "device 'tpu' is unknown"),
            ({"device": "cuda"}, DeviceError, "device 'cuda' is not available"),
            ({"device": "npu:1"}, DeviceError, "device 'npu:1' is not available"),
            ({"recipe": "w9a9"}, RecipeError, "recipe 'w9a9' is unknown"),
        ]:
            with pytest.raises(error, match=text):
                quantized(mlp(), **options)

    def test_min_sqnr(self) -> None:
        with pytest.raises(
            VerificationError, match=r"output 'y' reaches \d+\.\d dB SQNR, below --min-sqnr 200"
        ):
            quantized(mlp(), min_sqnr=200.0)
        assert quantized(mlp(), min_sqnr=0.0).metrics["sqnr_db"] > 20

    def test_samples_and_evaluation(self) -> None:
        proto = mlp()
        result = quantized(proto, samples=4, eval_data=feeds_for(proto, 3, seed=9))
        assert (result.context.calibration.samples, result.metrics["samples"]) == (4, 3)
        assert result.metrics["measured_on"] == "eval"
        assert quantized(proto, feeds_for(proto, 3)).metrics["measured_on"] == "calibration"

    def test_data_free(self) -> None:
        result = quantize(mlp(), seed=3)
        assert result.metrics["measured_on"] == "synthetic"
        assert result.metrics["sqnr_db"] > 30

    def test_progress_is_told(self) -> None:
        events: list[Progress] = []
        quantized(mlp(), listener=events.append)
        assert {e.what for e in events} == {"calibrating", "verifying"}
        for what in ("calibrating", "verifying"):
            done = [e.done for e in events if e.what == what]
            total = {e.total for e in events if e.what == what}
            assert done == list(range(1, len(done) + 1))
            assert total == {len(done)}

    def test_a_folder_of_samples(self, tmp_path: Path) -> None:
        for i, feed in enumerate(feeds_for(mlp(), 8)):
            np.savez(tmp_path / f"{i}.npz", **feed)
        onnx.save(mlp(), tmp_path / "m.onnx")
        result = quantize(tmp_path / "m.onnx", calib_data=tmp_path / "0.npz", eval_data=[tmp_path / "7.npz"])
        assert result.context.calibration.samples == 1
        assert quantize(
            str(tmp_path / "m.onnx"), calib_data=[tmp_path / f"{i}.npz" for i in range(4)]
        ).plan.weights


class TestSaving:
    def test_never_over_the_input(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        onnx.save(mlp(), path)
        before = path.read_bytes()
        with pytest.raises(GraphError, match="input"):
            quantize(path, calib_data=feeds_for(mlp())).save(path)
        assert path.read_bytes() == before

    def test_external_data(self, tmp_path: Path) -> None:
        result = quantized(mlp())
        paths = result.save(tmp_path / "m.onnx", external_data=True)
        assert paths.data is not None
        assert paths.data.is_file()
        session = ort.InferenceSession(paths.model, providers=["CPUExecutionProvider"])
        feed = feeds_for(mlp(), 1)[0]
        np.testing.assert_array_equal(
            session.run(None, dict(feed))[0], session_of(result.model).run(None, dict(feed))[0]
        )

    def test_a_file_that_answers_differently_is_not_left_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from onnxslim_ptq import api

        result = quantized(mlp())
        write = api.write_model

        def damaged(model: object, path: Path, **options: object) -> list[Path]:
            files = write(model, path, **options)  # type: ignore[arg-type]
            proto = onnx.load(path)
            tensor = next(t for t in proto.graph.initializer if t.name == "b1" or len(t.dims) == 2)
            tensor.raw_data = bytes(len(tensor.raw_data))
            onnx.save(proto, path)
            return files

        monkeypatch.setattr(api, "write_model", damaged)
        with pytest.raises(VerificationError, match="answers 'y' differently"):
            result.save(tmp_path / "sub" / "m.onnx")
        assert list(tmp_path.iterdir()) == []

    def test_metadata_and_documentation_survive(self, tmp_path: Path) -> None:
        proto = mlp()
        proto.doc_string, proto.graph.doc_string, proto.producer_name = "what it is", "graph text", "maker"
        proto.metadata_props.add(key="labels", value="größe\n0,1")
        proto.graph.node[0].doc_string = "first layer"
        proto.graph.input[0].doc_string = "the input"
        saved = onnx.load(quantized(proto).save(tmp_path / "m.onnx").model)
        assert (saved.doc_string, saved.graph.doc_string, saved.producer_name) == (
            "what it is",
            "graph text",
            "maker",
        )
        assert [(p.key, p.value) for p in saved.metadata_props] == [("labels", "größe\n0,1")]
        assert next(n for n in saved.graph.node if n.name == "mm1").doc_string == "first layer"
        assert saved.graph.input[0].doc_string == "the input"


class TestNotInt64Only:
    """Names, order and types of inputs and outputs are what the caller knows."""

    def test_signature(self) -> None:
        from tests.graph.models import parse
        from tests.models import weights_of

        body = """g (float[N,8] x, int64[N] ids, float[N,8] other)
            => (float[N,4] y, int64[N] out, int64[2] shape, float[N,4] z, bool[N,4] more)
            { y = MatMul (x, w) out = Identity (ids) shape = Shape (x) z = MatMul (other, w) more = Greater (y, z) }"""
        proto = parse(body, weights_of(1, w=(8, 4)))
        result = quantized(proto)
        for side in ("input", "output"):
            assert list(getattr(result.model.graph, side)) == list(getattr(proto.graph, side))
        report = result.metrics["per_output"]
        assert report["out"] == report["shape"] == {"equal": 1.0}
        assert report["y"]["sqnr_db"] > 30
        assert 0.8 < report["more"]["equal"] <= 1.0
        assert result.metrics["sqnr_db"] == min(report["y"]["sqnr_db"], report["z"]["sqnr_db"])

    def test_an_input_that_is_an_output(self) -> None:
        from tests.graph.models import parse
        from tests.models import weights_of

        proto = parse(
            "g (float[N,8] x) => (float[N,4] y, float[N,8] x) { y = MatMul (x, w) }", weights_of(1, w=(8, 4))
        )
        result = quantized(proto)
        assert [o.name for o in result.model.graph.output] == ["y", "x"]

    def test_a_sequence_output(self, tmp_path: Path) -> None:
        from tests.graph.models import parse
        from tests.models import weights_of

        body = """g (float[N,8] x) => (float[N,4] y, seq(float[N,4]) s)
            { y = MatMul (x, w) s = SequenceConstruct (y, y) }"""
        result = quantized(parse(body, weights_of(1, w=(8, 4))))
        assert result.metrics["per_output"]["s"]["sqnr_db"] == result.metrics["per_output"]["y"]["sqnr_db"]
        result.save(tmp_path / "m.onnx")
