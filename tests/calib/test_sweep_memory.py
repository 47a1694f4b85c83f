"""Memory does not grow with the number of samples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SWEEP = """
import sys
import numpy as np
from calib import Probe, collect
from calib.model import open_model
from calib.provider import SessionOptions
from calib.types import SampleId
from tests.calib.test_reduce import feeds, network

class Data:
    def __len__(self):
        return int(sys.argv[1])
    def __iter__(self):
        rng = np.random.default_rng(0)
        for i in range(len(self)):
            yield SampleId(i), {"x": rng.standard_normal((1, 3, 64, 64), dtype=np.float32)}

names = ("x", "c1", "r1", "p1", "c2", "k2", "c3", "r3", "y")
probes = [Probe(n, "histogram", None, (("most", 8192.0),)) for n in names] + [Probe(n, "mean", 1) for n in names]
lanes = int(sys.argv[2])
collect(open_model(network()), probes, Data(), options=SessionOptions(threads=lanes, lanes=lanes))
status = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))
"""


# What one lane holds of a sample: the input, seven tensors of 32 x 64 x 64, one of them padded, and eight channels out.
_SAMPLE_KB = (3 * 64 * 64 + 6 * 32 * 64 * 64 + 32 * 66 * 66 + 8 * 64 * 64) * 4 // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("lanes", [1, 2])
def test_512_samples_take_the_memory_of_16(lanes: int) -> None:
    """Lanes hold all their tensors at the same moment by chance, in 512 samples more likely than in 16."""
    few, many = (_peak_kb(count, lanes) for count in (16, 512))
    chance = (lanes - 1) * _SAMPLE_KB
    assert many <= 1.05 * few + chance, f"{few} kB for 16 samples, {many} kB for 512"


def _peak_kb(samples: int, lanes: int) -> int:
    command = [sys.executable, "-c", _SWEEP, str(samples), str(lanes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])
