"""External data in a Hugging Face cache: a snapshot's links into its own blobs, and no other link."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calib.external import read_tensor
from tests.calib.test_external import VALUES, refused, tensor


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The folder of one revision; blobs ``aa`` holds VALUES."""
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "aa").write_bytes(VALUES.tobytes())
    (repo / "blobs" / "bb").write_bytes(b"the model")
    folder = repo / "snapshots" / "0123abcd"
    (folder / "onnx").mkdir(parents=True)
    (folder / "m.onnx").symlink_to("../../blobs/bb")
    return folder


def test_allowed(snapshot: Path) -> None:
    (snapshot / "w.data").symlink_to("../../blobs/aa")
    np.testing.assert_array_equal(read_tensor(snapshot / "m.onnx", tensor()), VALUES)


def test_model_in_a_folder_below(snapshot: Path) -> None:
    (snapshot / "onnx" / "w.data").symlink_to("../../../blobs/aa")
    np.testing.assert_array_equal(read_tensor(snapshot / "onnx" / "m.onnx", tensor()), VALUES)


def test_data_in_a_folder_below(snapshot: Path) -> None:
    (snapshot / "onnx" / "w.data").symlink_to("../../../blobs/aa")
    np.testing.assert_array_equal(read_tensor(snapshot / "m.onnx", tensor("onnx/w.data")), VALUES)


def test_absolute_link_through_a_linked_cache(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(tmp_path / "hub")
    (snapshot / "w.data").symlink_to(tmp_path / "cache" / "models--org--name" / "blobs" / "aa")
    model = tmp_path / "cache" / "models--org--name" / "snapshots" / "0123abcd" / "m.onnx"
    np.testing.assert_array_equal(read_tensor(model, tensor()), VALUES)


def test_hard_linked_blob(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").hardlink_to(snapshot / "../../blobs/aa")
    (snapshot / "w.data").symlink_to("../../blobs/aa")
    np.testing.assert_array_equal(read_tensor(snapshot / "m.onnx", tensor()), VALUES)


@pytest.mark.parametrize(
    "target",
    [
        "../../../../secret",
        "../../blobs/../../../secret",
        "../../secret",
        "../../blobs",
        "../../blobs/.",
        "../../blobs/..",
        "../../refs/aa",
        "../../blobs/sub/aa",
        "../../../models--org--other/blobs/aa",
        "real.data",
        "/etc/passwd",
    ],
)
def test_link_elsewhere(snapshot: Path, tmp_path: Path, target: str) -> None:
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    repo = snapshot.parent.parent
    for folder in (other, repo / "refs", repo / "blobs" / "sub"):
        folder.mkdir(parents=True)
    places = [
        tmp_path / "secret",
        repo / "secret",
        repo / "refs" / "aa",
        repo / "blobs" / "sub" / "aa",
        other / "aa",
        snapshot / "real.data",
    ]
    for place in places:
        place.write_bytes(VALUES.tobytes())
    (snapshot / "w.data").symlink_to(target)
    refused(snapshot / "m.onnx", tensor(), "is a link")


def test_blob_that_is_a_link(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(VALUES.tobytes())
    (snapshot / "../../blobs/cc").symlink_to(tmp_path / "secret")
    (snapshot / "w.data").symlink_to("../../blobs/cc")
    refused(snapshot / "m.onnx", tensor(), "no regular file")


def test_blobs_folder_that_is_a_link(snapshot: Path, tmp_path: Path) -> None:
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "moved")
    blobs.symlink_to(tmp_path / "moved")
    (snapshot / "w.data").symlink_to("../../blobs/aa")
    refused(snapshot / "m.onnx", tensor(), "is a link")


def test_dangling_link(snapshot: Path) -> None:
    (snapshot / "w.data").symlink_to("../../blobs/gone")
    refused(snapshot / "m.onnx", tensor(), "cannot be read")


def test_linked_folder_in_a_snapshot(snapshot: Path) -> None:
    (snapshot / "sub").symlink_to("../../blobs")
    refused(snapshot / "m.onnx", tensor("sub/aa"), "folder sub is a link")


def test_same_layout_under_another_name(tmp_path: Path) -> None:
    repo = tmp_path / "org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "aa").write_bytes(VALUES.tobytes())
    folder = repo / "snapshots" / "rev"
    folder.mkdir(parents=True)
    (folder / "w.data").symlink_to("../../blobs/aa")
    refused(folder / "m.onnx", tensor(), "is a link")
