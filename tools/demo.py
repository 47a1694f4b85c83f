"""`make demo`: quantize the small digit network of `tools/digits`, measure what it cost and what it gained."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from onnxslim_ptq import quantize

DIGITS = Path(__file__).resolve().parent / "digits"
OUT = Path("demo-out")
THREADS = 2
ROUNDS = 15


def open_session(path: Path) -> ort.InferenceSession:
    """A CPU session with a fixed number of threads, the same for both models."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def sqnr_db(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """10 log10(sum y^2 / sum (y - y')^2), in float64."""
    y, z = reference.astype(np.float64), other.astype(np.float64)
    noise = float(np.square(y - z).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(np.square(y).sum() / noise))


def latencies_ms(
    sessions: list[ort.InferenceSession], feed: dict[str, NDArray[np.float32]], runs: int
) -> list[float]:
    """Median milliseconds per call; the sessions take turns, so that a busy machine slows both alike."""
    rounds: list[list[float]] = [[] for _ in sessions]
    for _ in range(ROUNDS):
        for session, times in zip(sessions, rounds, strict=True):
            session.run(None, feed)
            start = time.perf_counter()
            for _ in range(runs):
                session.run(None, feed)
            times.append((time.perf_counter() - start) / runs * 1e3)
    return [statistics.median(times) for times in rounds]


def main() -> None:
    console = Console()
    source, result = DIGITS / "digits.onnx", OUT / "digits_w8a8.onnx"
    OUT.mkdir(exist_ok=True)

    feeds = []
    for path in sorted((DIGITS / "calib").glob("*.npz")):
        with np.load(path, allow_pickle=False) as sample:
            feeds.append({"image": sample["image"]})
    start = time.perf_counter()
    quantize(source, recipe="w8a8", calib_data=feeds, target="cpu").save(result)
    seconds = time.perf_counter() - start

    with np.load(DIGITS / "eval.npz", allow_pickle=False) as held_out:
        images, labels = held_out["image"], held_out["label"]
    sessions = [open_session(source), open_session(result)]
    logits = [session.run(None, {"image": images})[0] for session in sessions]
    right = [int((y.argmax(axis=1) == labels).sum()) for y in logits]
    sizes = [path.stat().st_size for path in (source, result)]
    one = latencies_ms(sessions, {"image": images[:1]}, runs=200)
    many = latencies_ms(sessions, {"image": images[:64]}, runs=20)

    table = Table(title=f"Handwritten digits, {len(labels)} held-out images", title_justify="left")
    table.add_column("")
    for heading in ("float32", "int8", "int8 / float32"):
        table.add_column(heading, justify="right")
    table.add_row(
        "right answers", *(f"{n} ({n / len(labels):.2%})" for n in right), f"{right[1] - right[0]:+d}"
    )
    table.add_row("output SQNR", "", f"{sqnr_db(*logits):.1f} dB", "")
    table.add_row("file size", *(f"{n / 1024:.0f} KiB" for n in sizes), f"{sizes[1] / sizes[0]:.2f} x")
    table.add_row("latency, 1 image", *(f"{t:.3f} ms" for t in one), f"{one[1] / one[0]:.2f} x")
    table.add_row("latency, 64 images", *(f"{t:.3f} ms" for t in many), f"{many[1] / many[0]:.2f} x")
    console.print(table)
    console.print(
        f"Quantized with {len(feeds)} samples in {seconds:.1f} s. Latency: median of {ROUNDS} alternating rounds, "
        f"{THREADS} threads, ONNX Runtime {ort.__version__}. The network is tiny; docs/benchmarks.md has real ones."
    )
    console.print("Files written:")
    for path in sorted(OUT.iterdir()):
        console.print(f"  {path}  ({path.stat().st_size:,} bytes)", highlight=False)


if __name__ == "__main__":
    main()
