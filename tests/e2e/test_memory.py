"""Memory is the model and one sample, however many samples there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_CHILD = """
import resource, sys
import numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper
from onnxslim_ptq import quantize

rng = np.random.default_rng(0)
nodes, weights, last = [], [], "x"
for i, (a, b) in enumerate([(3, 32), (32, 32), (32, 32), (32, 32), (32, 32), (32, 8)]):
    weight = (rng.standard_normal((b, a, 3, 3)) / np.sqrt(a * 9)).astype(np.float32)
    weights.append(numpy_helper.from_array(weight, f"w{i}"))
    nodes += [helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1, 1, 1, 1]),
              helper.make_node("Relu", [f"c{i}"], [f"r{i}"])]
    last = f"r{i}"
nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"]))
graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 112, 112])],
                          [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 1, 1])], weights)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

class Samples:
    def __len__(self): return int(sys.argv[1])
    def __iter__(self):
        for i in range(len(self)):
            yield {"x": np.random.default_rng(i).standard_normal((1, 3, 112, 112)).astype(np.float32)}

quantize(model, recipe=sys.argv[2], calib_data=Samples(), threads=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-percentile", "w8a8-output-mse"])
def test_peak_does_not_grow_with_the_samples(recipe: str) -> None:
    """Peak resident memory of 32 and of 192 samples; until then bounded reservoirs still fill."""
    root = str(Path(__file__).parents[2])
    peaks = []
    for count in (32, 192):
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(count), recipe],
            check=True,
            capture_output=True,
            text=True,
            cwd=root,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] * 1.05, f"{peaks[0]} KiB grew to {peaks[1]} KiB"
