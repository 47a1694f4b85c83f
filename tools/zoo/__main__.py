"""`python -m tools.zoo fetch [NAME ...] | list | score NAME [--model FILE]`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .case import Case, ZooUnavailable
from .registry import load, names, native
from .session import evaluate


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a missing package or unknown name is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.zoo", description="Real models with labelled data."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download, export and render into the cache")
    fetch.add_argument("name", nargs="*", help="default: all; 'native': those that need no torch")
    commands.add_parser("list", help="the names of the cases")
    score = commands.add_parser("score", help="run a model over a case's evaluation data")
    score.add_argument("name")
    score.add_argument("--model", type=Path, help="another ONNX file with the same inputs and outputs")
    score.add_argument("--threads", type=int, default=0, help="onnxruntime threads (default: all cores)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "fetch":
            return _fetch(options.name)
        return _list() if options.command == "list" else _score(options.name, options.model, options.threads)
    except (ZooUnavailable, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def _fetch(wanted: list[str]) -> int:
    chosen = native() if wanted == ["native"] else wanted or names()
    missing = 0
    for name in chosen:
        start = time.perf_counter()
        try:
            case = load(name)
        except ZooUnavailable as error:
            missing += 1
            print(f"{name}: unavailable: {error}", file=sys.stderr)
            continue
        print(f"{name}: {describe(case)} ({time.perf_counter() - start:.1f} s)", flush=True)
    return 2 if missing else 0


def _list() -> int:
    for name in names():
        print(name if name in native() else f"{name} (exported with torch)")
    return 0


def describe(case: Case) -> str:
    """One line: file, size with external data, opset, numbers of samples."""
    import onnx

    model = onnx.load(str(case.model), load_external_data=False)
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    external = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [case.model, *(case.model.parent / name for name in external)]
    size = sum(file.stat().st_size for file in files) / 1e6
    samples = f"{len(case.calibration)} + {len(case.evaluation)} samples"
    return f"{case.model} {size:.1f} MB, opset {opset}, {samples}"


def _score(name: str, model: Path | None, threads: int) -> int:
    case = load(name)
    start = time.perf_counter()
    metrics = evaluate(case, model or case.model, threads)
    values = "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())
    print(f"{name}: {values}  ({len(case.evaluation)} samples, {time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
