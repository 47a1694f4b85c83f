"""Tensors on the disk: what goes in comes out, nothing stays behind, and a full disk is said in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calib.blocks.memory import available_memory
from calib.blocks.spool import Spool
from calib.errors import CalibrationError

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asarray(3.5, np.float64),
    np.zeros((1, 3, 0, 64), np.float16),
    np.array([True, False]),
    np.arange(1 << 17, dtype=np.int64).reshape(4, -1),
    np.asfortranarray(np.arange(1 << 16, dtype=np.float32).reshape(256, 256)),
]


class TestSpool:
    @pytest.mark.parametrize("values", ARRAYS, ids=lambda a: f"{a.dtype}{list(a.shape)}")
    def test_values_come_back(self, values: np.ndarray, tmp_path: Path) -> None:
        with Spool(tmp_path) as spool:
            spool.put("x", values)
            back = spool.get("x")
            assert (back.dtype, back.shape) == (values.dtype, values.shape)
            assert np.array_equal(back, values)

    def test_what_is_no_array_of_numbers_stays_in_memory(self, tmp_path: Path) -> None:
        with Spool(tmp_path) as spool:
            spool.put("s", np.array(["a", "b"], object))
            spool.put("l", [np.ones(2)])
            assert spool.get("s").tolist() == ["a", "b"]
            assert len(spool.get("l")) == 1
            assert list(spool.folder.iterdir()) == []

    def test_dropped_and_left_files_are_gone(self, tmp_path: Path) -> None:
        with Spool(tmp_path) as spool:
            for key in range(3):
                spool.put(key, ARRAYS[0])
            spool.drop(1)
            assert len(list(spool.folder.iterdir())) == 2
            with pytest.raises(KeyError):
                spool.get(1)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_nothing_is_left_after_an_exception(self, error: type[BaseException], tmp_path: Path) -> None:
        def interrupted() -> None:
            with Spool(tmp_path) as spool:
                spool.put(0, ARRAYS[0])
                raise error

        with pytest.raises(error):
            interrupted()
        assert list(tmp_path.iterdir()) == []

    def test_kept_values_outlive_the_spool_and_take_no_name(self, tmp_path: Path) -> None:
        with Spool(tmp_path) as spool:
            kept = spool.keep(ARRAYS[4])
            assert list(spool.folder.iterdir()) == [] or sys.platform == "win32"
        assert np.array_equal(kept, ARRAYS[4])
        assert not kept.flags.writeable

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
    def test_a_disk_that_refuses_is_named_and_leaves_no_half_file(self, tmp_path: Path) -> None:
        import resource

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        with Spool(tmp_path) as spool:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            try:
                with pytest.raises(
                    CalibrationError, match=r"cannot be spooled to '.*' \(File too large\); free"
                ):
                    spool.put(0, ARRAYS[4])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert list(spool.folder.iterdir()) == []

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs a folder that is a file")
    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CalibrationError, match="cannot be spooled to"), Spool(tmp_path / "file"):
            pass

    def test_a_file_that_was_cut_short_is_an_error(self, tmp_path: Path) -> None:
        with Spool(tmp_path) as spool:
            spool.put(0, ARRAYS[4])
            (file,) = spool.folder.iterdir()
            os.truncate(file, 70_000)
            with pytest.raises(CalibrationError, match="cannot be read back"):
                spool.get(0)


_LIMITED = """
import resource
from calib.blocks.memory import available_memory
free = available_memory()
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData:")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20), used + (64 << 20)))
left = available_memory()
assert free > left and 0 < left <= 64 << 20, (free, left)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestAvailableMemory:
    def test_it_is_a_part_of_the_machine(self) -> None:
        found = available_memory()
        assert found is not None
        assert 0 < found < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def test_a_limit_on_the_process_counts(self) -> None:
        subprocess.run([sys.executable, "-c", _LIMITED], check=True, cwd=Path(__file__).parents[2])
