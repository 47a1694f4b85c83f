"""`python -m tools.bench blockwise`: models larger than the memory they get, against the same run without a limit.

The limit is RLIMIT_DATA, which any user can set and every system enforces at once: it counts all private writable
memory of the process, so anonymous memory and, on top, address space that was reserved but never touched and private
mappings of files. A process that stays below it stays below it in anonymous memory, which is sampled as well
(RssAnon of /proc/self/status). A cgroup would need root and would count the page cache too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import calib.blocks.blockwise

from .large import large_model
from .machine import ROOT, stamp
from .tables import refresh

MB = 1 << 20
RECIPES: dict[str, dict[str, Any]] = {
    "minmax": {"steps": [{"type": "quantize", "act": {"range": {"type": "minmax"}}}]},
    "auto": {"steps": [{"type": "quantize"}]},
}
CASES = {"smollm2": (900, 4), "large": (2000, 2)}  # limit in MB, samples
_SAME = 1e-6
_INTRO = """## Models larger than memory

Calibrated, quantized, verified and written by a process that may take so much memory and no more (RLIMIT_DATA, which
counts all private writable memory: anonymous memory, and on top address space that is only reserved and private
mappings of files), block after block; below it the same without a limit. Peaks: anonymous memory (RssAnon, sampled),
what the limit counts (VmData, sampled), resident memory with the pages of mapped files, which the system takes back
when it needs them. `large` is a synthetic transformer with 4 GB of external data. Ranges are `minmax`, with
`--min-sqnr 0`: the figure is memory, not quality. SmolLM2 quantized like this reaches only about 3 dB on its worst
output, which the default `--min-sqnr 6` refuses.

"""
_HEAD = (
    "| model | limit | model file | anonymous | counted by the limit | resident | time | scales differ by |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def main(arguments: list[str] | None = None) -> int:
    """Run each case limited and unlimited and write the section of docs/benchmarks.md; 1 when a scale differs."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench blockwise", description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated (default: all)")
    parser.add_argument("--recipe", choices=list(RECIPES), default="minmax", help="how ranges are found")
    parser.add_argument("--limited-only", action="store_true", help="without the run to compare with")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md", help="file to refresh")
    options = parser.parse_args(arguments)
    command = shlex.join(
        ["python", "-m", "tools.bench", "blockwise", *(sys.argv[2:] if arguments is None else arguments)]
    )
    marks, rows, failed = stamp(command), list[str](), False
    for name in options.cases.split(","):
        limit, samples = CASES[name]
        job = {"case": name, "samples": samples, "recipe": options.recipe}
        limited = _run({**job, "limit": limit})
        whole = None if options.limited_only else _run({**job, "limit": 0})
        difference = None if whole is None else _difference(limited, whole)
        failed |= difference is not None and not difference <= _SAME
        rows.append(_row(limited, f"{limit} MB", name, difference))
        rows += [] if whole is None else [_row(whole, "none", name, None)]
        print("\n".join(rows[-2:]), flush=True)
    text = (
        _INTRO
        + "\n".join([*_HEAD, *rows])
        + "\n\n"
        + "  \n".join([f"{marks['date']}, `{marks['command']}`", marks["machine"], marks["versions"]])
    )
    refresh(options.out, "blockwise", text)
    return int(failed)


def _row(run: dict[str, Any], limit: str, name: str, difference: float | None) -> str:
    sizes = [f"{run[key]:.0f} MB" for key in ("file", "anonymous", "data", "resident")]
    seconds = f"{run['seconds']:.0f} s"
    last = "" if difference is None else f"{difference:.2g}"
    return f"| {' | '.join([name, limit, *sizes, seconds, last])} |"


def _difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    if one["scales"].keys() != other["scales"].keys():
        return float("inf")
    pairs = ((np.asarray(one["scales"][key]), np.asarray(other["scales"][key])) for key in one["scales"])
    return max(float(np.max(np.abs(a - b) / b, initial=0.0)) for a, b in pairs)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-blockwise-", dir="/var/tmp") as folder:
        job = {**job, "folder": folder}
        command = [sys.executable, "-m", "tools.bench.blockwise", json.dumps(job)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder},  # the spool goes there, and goes with it whatever happens
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{job['case']} (limit {job['limit']} MB) failed: {done.stderr.strip()[-2000:]}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


def _child(job: dict[str, Any]) -> dict[str, Any]:
    """One run: quantize, verify, write; what it took, and every scale."""
    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_DATA, (job["limit"] * MB, job["limit"] * MB))
    else:  # as on a system that does not tell how much memory there is: else a busy one would get blocks, too
        calib.blocks.blockwise.available_memory = lambda: None
    from onnxslim_ptq import quantize

    model, calibration, evaluation = _case(job["case"], job["samples"])
    peaks = {"RssAnon": 0, "VmData": 0}
    threading.Thread(target=_watch, args=(peaks,), daemon=True).start()
    start = time.perf_counter()
    result = quantize(
        model,
        RECIPES[job["recipe"]],
        calibration,
        eval_data=evaluation,
        threads=2,
        min_sqnr=0,  # the figure is memory; static int8 activations cost language models more than the default allows
        blockwise=bool(job["limit"]),
    )
    if result.blockwise != bool(job["limit"]):
        raise SystemExit("blocks were used without a limit, or none with one")
    result.save(Path(job["folder"]) / "out.onnx")
    scales = {f"activation {key}": np.asarray(p.scale).tolist() for key, p in result.plan.params.items()}
    scales |= {
        f"weight {key}": np.asarray(c.params.scale).tolist() for key, c in result.plan.weight_codes.items()
    }
    return {
        "file": sum(f.stat().st_size for f in model.parent.glob(f"{model.name}*")) / MB,
        "anonymous": peaks["RssAnon"] / 1024,
        "data": peaks["VmData"] / 1024,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": time.perf_counter() - start,
        "sqnr": result.metrics["sqnr_db"],
        "scales": scales,
    }


def _case(name: str, samples: int) -> tuple[Path, list[Any], list[Any]]:
    if name == "large":
        return large_model(samples)
    from tools.zoo import load

    case = load(name)
    chosen = np.linspace(0, len(case.calibration) - 1, samples).astype(int)
    return case.model, [case.calibration[int(i)] for i in chosen], [case.evaluation[0]]


def _watch(peaks: dict[str, int]) -> None:
    while True:
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]))
        time.sleep(0.02)


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
