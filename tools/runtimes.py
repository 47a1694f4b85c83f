"""`python -m tools.runtimes`: files for target openvino in OpenVINO beside ONNX Runtime, SQNR against the float model.

The networks of `tools.nets` on random inputs (8 to calibrate, 8 to compare) and models of `tools.zoo` on evaluation
samples. OpenVINO computes what is float in float32; without the hint some processors take bfloat16. ONNX Runtime runs
with and without optimizations: how far these two are apart is what the order of sums alone does to a network.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from onnxslim_ptq import quantize
from tools import nets
from tools.bench.error import Noise
from tools.bench.tables import markdown
from tools.zoo import load
from tools.zoo.session import open_session

Feeds = Sequence[dict[str, np.ndarray]]
Run = Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]
_NETS = {"resnet18": nets.resnet18, "mobilenet": nets.mobilenet, "bert": nets.bert}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.runtimes", description=__doc__)
    parser.add_argument(
        "--models", default=",".join((*_NETS, "effnet", "rec", "cls")), help="networks or zoo names"
    )
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--samples", type=int, default=100, help="of a zoo model, at most")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models.split(","):
            model, calibration, feeds = _case(name, options.samples, Path(folder))
            path = Path(folder) / "quantized.onnx"
            quantize(model, options.recipe, calibration, target="openvino", min_sqnr=0).save(path)
            exact = list(map(_onnxruntime(model), feeds))
            found = [_sqnr(exact, map(run, feeds)) for run in _runs(path)]
            rows.append([f"`{name}`", str(len(feeds)), *(f"{value:.1f}" for value in found)])
            print(rows[-1], flush=True)
    print(markdown(["model", "samples", "OpenVINO", "ONNX Runtime", "without optimizations"], rows))


def _case(name: str, most: int, folder: Path) -> tuple[Path, Feeds, Feeds]:
    if name not in _NETS:
        case = load(name)
        count = min(most, len(case.evaluation))
        return case.model, list(case.calibration), [dict(case.evaluation[i]) for i in range(count)]
    proto = _NETS[name]()
    path = folder / f"{name}.onnx"
    onnx.save(proto, path)
    rng = np.random.default_rng(0)
    feeds = [{v.name: _random(rng, v) for v in proto.graph.input} for _ in range(16)]
    return path, feeds[:8], feeds[8:]


def _random(rng: np.random.Generator, value: onnx.ValueInfoProto) -> np.ndarray:
    tensor = value.type.tensor_type
    shape = [d.dim_value or 1 for d in tensor.shape.dim]
    if tensor.elem_type == onnx.TensorProto.FLOAT:
        return rng.standard_normal(shape).astype(np.float32)
    return rng.integers(0, 100, shape)


def _runs(path: Path) -> Iterator[Run]:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    yield lambda feed: [compiled(feed)[i] for i in range(len(compiled.outputs))]
    yield _onnxruntime(path)
    yield _onnxruntime(path, optimize=False)


def _onnxruntime(path: Path, optimize: bool = True) -> Run:
    return partial(open_session(path, optimize=optimize).run, None)


def _sqnr(exact: Sequence[Sequence[np.ndarray]], seen: Iterator[Sequence[np.ndarray]]) -> float:
    noise = Noise([str(i) for i in range(len(exact[0]))])
    for y, z in zip(exact, seen, strict=True):
        noise.add(y, z)
    return noise.worst() or 0.0


if __name__ == "__main__":
    main()
