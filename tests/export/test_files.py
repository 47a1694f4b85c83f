"""AtomicFiles: all files of a result appear together or nothing changes; inputs are never written over."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calib.errors import GraphError
from calib.model import open_model
from calib.provider import create_session
from onnxslim_ptq.export import files
from onnxslim_ptq.export.check import check_file, source_files
from onnxslim_ptq.export.files import AtomicFiles, OutputPaths, output_paths, write_model


def _fill(target: OutputPaths, text: str = "new") -> None:
    for path in target.in_order():
        path.write_text(text)


def _write(paths: OutputPaths, error: BaseException | None = None) -> None:
    with AtomicFiles(paths) as out:
        _fill(out.temporary)
        if error is not None:
            raise error
        out.commit()


def _tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


def _save_model(path: Path, external: bool = False) -> None:
    weight = numpy_helper.from_array(np.eye(40, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 40])],
        [helper.make_tensor_value_info("y", 1, [1, 40])],
        [weight],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(proto, path, save_as_external_data=external, location="weights.bin" if external else None)


@pytest.mark.parametrize(
    ("out", "model", "json"),
    [
        ("out/q.onnx", "out/q.onnx", "out/q.json"),
        ("q.v2.onnx", "q.v2.onnx", "q.v2.json"),
        ("Q.ONNX", "Q.ONNX", "Q.json"),
        ("out", "out/m.x_w8a8.onnx", "out/m.x_w8a8.json"),
        ("out.d", "out.d/m.x_w8a8.onnx", "out.d/m.x_w8a8.json"),
    ],
)
def test_output_paths(out: str, model: str, json: str) -> None:
    paths = output_paths(Path(out), "m.x", "W8A8")
    assert (paths.model, paths.json) == (Path(model), Path(json))
    assert paths.data == Path(model + ".data")
    assert paths.params == Path(json.removesuffix(".json") + ".params.safetensors")


def test_commit_moves_what_was_written(tmp_path: Path) -> None:
    paths = output_paths(tmp_path / "a" / "b" / "q.onnx", "m", "w8a8")
    with AtomicFiles(paths) as out:
        out.temporary.model.write_text("model")
        out.temporary.json.write_text("json")
        (out.folder / "scratch").write_text("vanishes")
        assert out.temporary.model.name == "q.onnx"
        assert out.folder.parent == paths.model.parent
        assert not paths.model.exists()
        written = out.commit()
    assert written == OutputPaths(paths.model, None, paths.json, None)
    assert _tree(tmp_path / "a" / "b") == {"q.json": "json", "q.onnx": "model"}


def test_out_is_replaced_only_at_commit(tmp_path: Path) -> None:
    paths = output_paths(tmp_path / "q.onnx", "m", "w8a8")
    _fill(paths, "old")
    with AtomicFiles(paths) as out:
        _fill(out.temporary)
        assert {p.read_text() for p in paths.in_order()} == {"old"}
        out.commit()
    assert _tree(tmp_path) == {p.name: "new" for p in paths.in_order()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_leaves_everything_as_it_was(
    tmp_path: Path, error: type[BaseException], existing: bool
) -> None:
    paths = output_paths(tmp_path / ("" if existing else "new/folder") / "q.onnx", "m", "w8a8")
    if existing:
        _fill(paths, "old")
    before = _tree(tmp_path)
    with pytest.raises(error):
        _write(paths, error())
    assert _tree(tmp_path) == before


def test_without_commit_nothing_remains(tmp_path: Path) -> None:
    with AtomicFiles(output_paths(tmp_path / "new" / "q.onnx", "m", "w8a8")) as out:
        _fill(out.temporary)
    assert _tree(tmp_path) == {}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_a_failing_commit_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, error: BaseException, fails_at: int
) -> None:
    paths = output_paths(tmp_path / "q.onnx", "m", "w8a8")
    if existing:
        _fill(paths, "old")
    before, really, moved = _tree(tmp_path), os.replace, []

    def replace(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path and Path(source).suffix != ".old":
            if len(moved) == fails_at:
                raise error
            moved.append(Path(target).name)
        really(source, target)

    monkeypatch.setattr(os, "replace", replace)
    expected = GraphError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        _write(paths)
    assert _tree(tmp_path) == before
    assert moved == ["q.onnx.data", "q.params.safetensors", "q.onnx", "q.json"][:fails_at]


def test_a_failing_commit_is_undone_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = output_paths(tmp_path / "q.onnx", "m", "w8a8")
    _fill(paths, "old")
    before, really = _tree(tmp_path), os.replace

    def no_link(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    def replace(source: Path, target: Path) -> None:
        if target == paths.json and Path(source).suffix != ".old":
            raise OSError(5, "Input/output error")
        really(source, target)

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(GraphError, match="Input/output error"):
        _write(paths)
    assert _tree(tmp_path) == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o640), (0o022, 0o640), (0o027, 0o640), (0o077, 0o600)])
def test_modes(tmp_path: Path, umask: int, mode: int) -> None:
    paths = output_paths(tmp_path / "new" / "q.onnx", "m", "w8a8")
    before = os.umask(umask)
    try:
        with AtomicFiles(paths) as out:
            _fill(out.temporary)
            assert stat.S_IMODE(out.folder.stat().st_mode) == 0o700
            out.commit()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths.in_order()} == {mode}
    assert stat.S_IMODE(paths.model.parent.stat().st_mode) == 0o750 & ~umask


def test_external_model_is_verified_before_it_is_moved(tmp_path: Path) -> None:
    _save_model(tmp_path / "m.onnx")
    paths = output_paths(tmp_path / "out", "m", "w8a8")
    with AtomicFiles(paths, source_files(tmp_path / "m.onnx")) as out:
        write_model(open_model(tmp_path / "m.onnx"), out.temporary.model, external=True)
        x = np.ones((1, 40), np.float32)
        assert check_file(out.temporary.model, source=tmp_path / "m.onnx") == []
        np.testing.assert_array_equal(create_session(out.temporary.model).run(None, {"x": x})[0], x)
        written = out.commit()
    assert written.data == tmp_path / "out" / "m_w8a8.onnx.data"
    np.testing.assert_array_equal(create_session(written.model).run(None, {"x": x})[0], x)


def _links(folder: Path) -> dict[str, Path]:
    """Ways to name an input: itself, through a link, by a second name, through a linked folder, in a roundabout way."""
    (folder / "soft.onnx").symlink_to(folder / "in" / "m.onnx")
    (folder / "hard.onnx").hardlink_to(folder / "in" / "m.onnx")
    (folder / "linked").symlink_to(folder / "in")
    return {
        "itself": folder / "in" / "m.onnx",
        "symlink": folder / "soft.onnx",
        "hard link": folder / "hard.onnx",
        "linked folder": folder / "linked" / "m.onnx",
        "dots": folder / "in" / ".." / "in" / "m.onnx",
    }


@pytest.mark.parametrize("way", ["itself", "symlink", "hard link", "linked folder", "dots"])
def test_never_over_the_input(tmp_path: Path, way: str) -> None:
    (tmp_path / "in").mkdir()
    _save_model(tmp_path / "in" / "m.onnx")
    out = _links(tmp_path)[way]
    before = (tmp_path / "in" / "m.onnx").read_bytes()
    protected = source_files(tmp_path / "in" / "m.onnx")
    with pytest.raises(GraphError, match=r"is the same file as the input .*; choose another OUT"):
        AtomicFiles(output_paths(out, "m", "w8a8"), protected).__enter__()
    assert (tmp_path / "in" / "m.onnx").read_bytes() == before
    assert [p for p in tmp_path.rglob("*") if p.suffix == ".tmp"] == []


def test_never_over_the_data_of_the_input(tmp_path: Path) -> None:
    _save_model(tmp_path / "m.onnx", external=True)
    (tmp_path / "weights.bin").rename(tmp_path / "q.onnx.data")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = "q.onnx.data" if entry.key == "location" else entry.value
    onnx.save(proto, tmp_path / "m.onnx")
    assert source_files(tmp_path / "m.onnx") == [tmp_path / "m.onnx", tmp_path / "q.onnx.data"]
    with pytest.raises(GraphError, match=r"q.onnx.data' is the same file as the input"):
        AtomicFiles(
            output_paths(tmp_path / "q.onnx", "m", "w8a8"), source_files(tmp_path / "m.onnx")
        ).__enter__()


def test_a_link_at_out_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("untouched")
    (tmp_path / "q.onnx").symlink_to("other")
    with AtomicFiles(output_paths(tmp_path / "q.onnx", "m", "w8a8")) as out:
        out.temporary.model.write_text("new")
        out.commit()
    assert _tree(tmp_path) == {"other": "untouched", "q.onnx": "new"}
    assert not (tmp_path / "q.onnx").is_symlink()


def test_impossible_destinations(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("a file")
    for out, text in [
        ("folder.onnx", "is a folder"),
        ("file", "cannot be written .* one file ends in .onnx"),
        ("file/x/q.onnx", "cannot be written .* one file ends in .onnx"),
        ("n" * 300 + ".onnx", "cannot be written"),
    ]:
        with pytest.raises(GraphError, match=text) as caught:
            AtomicFiles(output_paths(tmp_path / out, "m", "w8a8")).__enter__()
        assert "\n" not in str(caught.value)
    assert _tree(tmp_path) == {"file": "a file", "folder.onnx": "folder"}


def test_source_files_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello, I am no model")
    for path in (tmp_path / "text.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(GraphError, match=path.name):
            source_files(path)


def test_files_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(files, "_flush", lambda path: flushed.append(path.name))
    monkeypatch.setattr(files, "_flush_folder", lambda path: flushed.append(str(path)))
    with AtomicFiles(output_paths(tmp_path / "q.onnx", "m", "w8a8")) as out:
        _fill(out.temporary)
        out.commit()
    assert flushed == ["q.onnx.data", "q.params.safetensors", "q.onnx", "q.json", str(tmp_path)]
