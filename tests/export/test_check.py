"""check_file: what the format's checker refuses is an error, unless the float model had the same defect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_ptq.errors import VerificationError
from onnxslim_ptq.export.check import check_file

_WEIGHT = numpy_helper.from_array(np.ones((4, 400), np.float32), "w")


def _model(
    nodes: Sequence[onnx.NodeProto], *, hidden: int | None = None, domains: Sequence[str] = (), ir: int = 8
) -> onnx.ModelProto:
    values = [] if hidden is None else [helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, hidden])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 400])],
        [_WEIGHT],
        value_info=values,
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir)


_NODES = (helper.make_node("MatMul", ["x", "w"], ["h"], "mm"), helper.make_node("Relu", ["h"], ["y"], "relu"))


def _save(folder: Path, name: str, model: onnx.ModelProto) -> Path:
    onnx.save(model, folder / name)
    return folder / name


def test_a_valid_file_has_no_notes_and_is_not_touched(tmp_path: Path) -> None:
    path = _save(tmp_path, "m.onnx", _model(_NODES))
    before = path.read_bytes()
    assert check_file(path) == []
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (_model(_NODES, hidden=7), "Inferred shape and existing shape differ"),
        (_model(_NODES[::-1]), "topologically sorted"),
        (_model([helper.make_node("Foo", ["x"], ["y"])]), "No Op registered for Foo"),
        (
            _model([helper.make_node("Foo", ["x"], ["y"], domain="com.microsoft")]),
            "No opset import for domain",
        ),
        (_model(_NODES, ir=3), "not in graph input"),
    ],
)
def test_a_defect_is_one_line(tmp_path: Path, model: onnx.ModelProto, text: str) -> None:
    path = _save(tmp_path, "m.onnx", model)
    good = _save(tmp_path, "good.onnx", _model(_NODES))
    for source in (None, good):
        with pytest.raises(VerificationError, match=text) as caught:
            check_file(path, source=source)
        assert str(caught.value).startswith("the written model 'm.onnx' fails onnx.checker: ")
        assert "\n" not in str(caught.value)


def test_a_defect_of_the_source_is_a_note(tmp_path: Path) -> None:
    path = _save(tmp_path, "m.onnx", _model(_NODES, hidden=9))
    source = _model(_NODES, hidden=7)
    notes = check_file(path, source=source)
    assert notes == check_file(path, source=_save(tmp_path, "source.onnx", source))
    assert len(notes) == 1
    assert notes[0].startswith("shapes were not checked, the float model already fails onnx.checker: ")
    unknown = _save(tmp_path, "unknown.onnx", _model([helper.make_node("Foo", ["x"], ["y"], "a")]))
    [note] = check_file(unknown, source=_model([helper.make_node("Foo", ["x"], ["y"], "b")]))
    assert note.startswith("operators and shapes were not checked")


def test_another_defect_of_the_source_is_no_excuse(tmp_path: Path) -> None:
    unsorted = _save(tmp_path, "m.onnx", _model(_NODES[::-1]))
    for source in (_model(_NODES, hidden=7), _model([helper.make_node("Foo", ["x"], ["y"])])):
        with pytest.raises(VerificationError, match="topologically sorted"):
            check_file(unsorted, source=source)


def test_other_domains_are_noted(tmp_path: Path) -> None:
    node = helper.make_node("Foo", ["x", "w"], ["y"], domain="com.microsoft")
    assert check_file(_save(tmp_path, "m.onnx", _model([node], domains=["com.microsoft"]))) == [
        "onnx.checker does not know the domain com.microsoft: 1 nodes were not checked by it"
    ]


def test_external_data(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(_model(_NODES), path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    assert check_file(path) == []
    (tmp_path / "m.onnx.data").write_bytes(b"short")  # onnx.checker does not look at the length
    with pytest.raises(VerificationError, match=r"cannot be read again: .*m\.onnx\.data"):
        check_file(path)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(VerificationError, match="cannot be read again: "):
        check_file(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = _save(tmp_path, "m.onnx", _model(_NODES))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(VerificationError, match="cannot be read again: "):
        check_file(path)
