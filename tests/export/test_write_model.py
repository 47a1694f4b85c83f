"""write_model: what is written is the model, byte by byte, wherever its weights lie, without holding them all."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib.errors import GraphError
from calib.model import Model, open_model
from calib.provider import create_session
from onnxslim_ptq.export import files
from onnxslim_ptq.export.files import write_model


def _proto(width: int = 600, **extra: onnx.TensorProto) -> onnx.ModelProto:
    """y = relu(x @ w) @ u + b: one weight above 1 MiB, one above 1 KiB, one small."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(width, width)),
        "u": rng.normal(size=(width, 3)),
        "b": rng.normal(size=3),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "u"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", width])],
        [helper.make_tensor_value_info("y", 1, ["n", 3])],
        [*(numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()), *extra.values()],
        doc_string="graph text",
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="test"
    )
    helper.set_model_props(model, {"key": "größe"})
    model.graph.initializer[0].doc_string = "weight text"
    return model


def _run(path: Path, width: int = 600) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(2, width)).astype(np.float32)
    return create_session(path).run(None, {"x": x})[0]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("from_file", [False, True])
def test_round_trip(tmp_path: Path, external: bool, from_file: bool) -> None:
    proto = _proto()
    source = tmp_path / "source.onnx"
    onnx.save(proto, source)
    path = tmp_path / "out.onnx"
    written = write_model(open_model(source if from_file else proto), path, external=external)
    assert written == ([path.with_name("out.onnx.data"), path] if external else [path])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({p.name for p in written} | {"source.onnx"})
    loaded = onnx.load(path)
    for tensor in loaded.graph.initializer:  # onnx.load leaves the location behind
        tensor.ClearField("data_location")
    assert loaded == proto
    np.testing.assert_array_equal(_run(path), _run(source))
    onnx.checker.check_model(path, full_check=True)
    assert open_model(path).sha256 == open_model(source).sha256


def test_embedded_bytes_are_a_plain_protobuf(tmp_path: Path) -> None:
    proto = _proto()
    write_model(open_model(proto), tmp_path / "a.onnx")
    assert onnx.ModelProto.FromString((tmp_path / "a.onnx").read_bytes()) == proto


@pytest.mark.parametrize("external", [False, True])
def test_same_bytes_twice(tmp_path: Path, external: bool) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written.append(write_model(open_model(_proto()), tmp_path / name / "m.onnx", external=external))
    assert [p.read_bytes() for p in written[0]] == [p.read_bytes() for p in written[1]]


def test_external_layout(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_model(open_model(_proto()), path, external=True)
    tensors = {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
    where = {n: {e.key: e.value for e in t.external_data} for n, t in tensors.items()}
    assert where["b"] == {}, "small tensors stay in the model"
    assert where["w"]["location"] == where["u"]["location"] == "m.onnx.data"
    assert int(where["w"]["length"]) == 600 * 600 * 4
    assert int(where["w"]["offset"]) % 4096 == 0
    assert int(where["u"]["offset"]) % 64 == 0
    assert (tmp_path / "m.onnx.data").stat().st_size == int(where["u"]["offset"]) + int(where["u"]["length"])


def test_nothing_large_means_no_data_file(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, 1, [2]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    path = tmp_path / "m.onnx"
    assert write_model(open_model(helper.make_model(graph)), path, external=True) == [path]
    assert list(tmp_path.iterdir()) == [path]


def test_external_by_itself_when_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EMBEDDED_LIMIT", 100_000)
    path = tmp_path / "m.onnx"
    assert write_model(open_model(_proto()), path) == [path.with_name("m.onnx.data"), path]
    monkeypatch.setattr(files, "EMBEDDED_LIMIT", 100)
    with pytest.raises(GraphError, match="exceeds 2 GB even with external data"):
        write_model(open_model(_proto()), path)


def test_unusual_types_and_layouts(tmp_path: Path) -> None:
    """bfloat16 and int4 lie packed in the skeleton; strings, empty and transposed arrays go through as well."""
    packed = helper.make_tensor("i4", TensorProto.INT4, [3001], [i % 15 - 7 for i in range(3001)])
    half = numpy_helper.from_array(
        np.ones(
            (40, 40), numpy_helper.to_array(helper.make_tensor("t", TensorProto.BFLOAT16, [1], [1.0])).dtype
        ),
        "bf",
    )
    text = helper.make_tensor("s", TensorProto.STRING, [2], ["a" * 600, "b" * 600])
    empty = numpy_helper.from_array(np.zeros((0, 4), np.float32), "e")
    double = helper.make_tensor("d", TensorProto.DOUBLE, [300], np.arange(300.0))
    proto = _proto(10, packed=packed, half=half, text=text, empty=empty, double=double)
    model = open_model(proto)
    model.weights["d"] = model.weights["d"][::-1][::-1].reshape(3, 100).T.reshape(100, 3).reshape(300)
    transposed = np.arange(4000.0, dtype=np.float32).reshape(40, 100).T
    extra = TensorProto(name="t", dims=transposed.shape, data_type=1)
    files_model = Model(model.proto, {**model.weights, "t": transposed}, None, 0)
    files_model.proto.graph.initializer.append(extra)
    for external in (False, True):
        path = tmp_path / f"{external}.onnx"
        write_model(files_model, path, external=external)
        found = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        np.testing.assert_array_equal(found["t"], transposed)
        for tensor in (packed, half, text, empty):
            np.testing.assert_array_equal(found[tensor.name], numpy_helper.to_array(tensor))
        np.testing.assert_array_equal(found["d"], model.weights["d"])


def test_a_weight_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = open_model(_proto())
    model.weights["w"] = model.weights["w"][:5]
    with pytest.raises(GraphError, match=r"initializer 'w' is declared as \[600, 600\] .*please report"):
        write_model(model, tmp_path / "m.onnx")
    del model.weights["w"]
    with pytest.raises(GraphError, match="initializer 'w' has no values"):
        write_model(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("external", [False, True])
def test_weights_are_streamed(tmp_path: Path, external: bool) -> None:
    source = tmp_path / "source.onnx"
    onnx.save(_proto(3000), source)  # 36 MB
    model = open_model(source)
    tracemalloc.start()
    write_model(model, tmp_path / "m.onnx", external=external)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    np.testing.assert_array_equal(_run(tmp_path / "m.onnx", 3000), _run(source, 3000))


@pytest.mark.slow
def test_above_two_gigabytes(tmp_path: Path) -> None:
    big = np.memmap(tmp_path / "zeros", np.float32, "w+", shape=(24_000, 24_000))  # sparse: 2.3 GB of nothing
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", 1, [1, 24_000])],
            [helper.make_tensor_value_info("y", 1, [1, 24_000])],
            [TensorProto(name="w", dims=big.shape, data_type=1)],
        ),
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17)],
    )
    path = tmp_path / "m.onnx"
    tracemalloc.start()
    assert write_model(Model(proto, {"w": big}, None, big.nbytes), path) == [
        path.with_name("m.onnx.data"),
        path,
    ]
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    onnx.checker.check_model(path, full_check=True)
    assert open_model(path).weights["w"].shape == big.shape
    path.with_name("m.onnx.data").unlink()  # pytest keeps temporary folders
