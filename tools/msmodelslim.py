"""``python -m tools.msmodelslim``: how long squant_ptq's modes take on a network of ResNet-18's size.

Each mode is timed beside the plain forward pass over the same samples, in the same process; ``run`` is what the goals
are about, ``export`` renders, verifies and writes. On a shared machine the wall clock says
little: the processor time of ``run`` is given too, an upper bound of what a quiet machine of one core takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from onnxslim_ptq.frontends.squant_ptq import OnnxCalibrator, QuantConfig
from tools.nets import resnet18

_MODES = {
    "data-free, sigma and flips": {},
    "label-free, moving average": {"quant_mode": 1, "act_method": 1},
    "label-free, histogram": {"quant_mode": 1, "act_method": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=8)
    samples = parser.parse_args().samples
    rng = np.random.default_rng(0)
    data = [[rng.standard_normal((1, 3, 224, 224)).astype(np.float32)] for _ in range(samples)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet18.onnx"
        onnx.save(resnet18(), path)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for name, config in _MODES.items():
            start = time.perf_counter()
            for (x,) in data:
                session.run(None, {"x": x})
            forward = time.perf_counter() - start
            start, busy = time.perf_counter(), time.process_time()
            calibrator = OnnxCalibrator(str(path), QuantConfig(**config), data if config else None)
            calibrator.run()
            run, busy = time.perf_counter() - start, time.process_time() - busy
            start = time.perf_counter()
            calibrator.export_quant_onnx(str(Path(folder) / "out.onnx"))
            export = time.perf_counter() - start
            goal = 2 * forward + 1 if config else 3.0
            print(
                f"{name}: forward {forward:.2f} s, run {run:.2f} s ({busy:.2f} s of processors, goal {goal:.2f} s), "
                f"export {export:.2f} s"
            )


if __name__ == "__main__":
    main()
