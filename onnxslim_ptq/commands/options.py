"""Options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "TARGET_HELP",
    "AllowQuantized",
    "Blockwise",
    "Calib",
    "Device",
    "Exclude",
    "Include",
    "Json",
    "Model",
    "Nan",
    "Out",
    "Preprocess",
    "Quiet",
    "Ray",
    "Recipe",
    "ReduceRange",
    "Resume",
    "Samples",
    "Seed",
    "Stacked",
    "Target",
    "Threads",
    "Tokenizer",
    "Verbose",
    "Workers",
]

# Written out, because the table of targets loads numpy and --help does not wait for that.
TARGET_HELP = "cpu, generic, qoperator, tensorrt, openvino or ascend."

Model = Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="The float ONNX model.")]
Out = Annotated[
    Path,
    typer.Argument(metavar="OUT", show_default=False, help="The file to write (ends in .onnx), or a folder."),
]
Calib = Annotated[
    list[Path] | None,
    typer.Option(
        "--calib",
        metavar="PATH",
        show_default=False,
        help="Samples: a folder of .npz, .npy or image files, of text, or such a file. Repeatable.",
    ),
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="imagenet|coco|none",
        show_default=False,
        help="What turns images into inputs; more in the recipe's data section.",
    ),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="FILE",
        show_default=False,
        help="The tokenizer.json that turns .txt and .jsonl files into inputs.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", min=1, show_default=False, help="Use the first N samples only."),
]
Stacked = Annotated[bool, typer.Option("--stacked", help="The first axis of each array runs over samples.")]
Blockwise = Annotated[
    bool, typer.Option("--blockwise", help="Run the model in blocks, as is done where memory is short.")
]
Threads = Annotated[
    int, typer.Option("--threads", metavar="N", min=0, help="Threads; 0 = ONNX Runtime decides.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Nothing but one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No summary, only warnings and errors.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Every detail; a traceback for unexpected errors.")
]
Recipe = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="A ready recipe or a YAML file.")]
Device = Annotated[
    str, typer.Option("--device", metavar="cpu|npu[:ID]|cuda[:ID]", help="Where calibration runs.")
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="NAME",
        show_default="the recipe's",
        help=TARGET_HELP,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        show_default=False,
        help="Layers to quantize: glob, re:… or op:Conv. Repeatable.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="PATTERN", show_default=False, help="Layers to leave float. Repeatable."
    ),
]
Nan = Annotated[
    str, typer.Option("--nan", metavar="error|ignore|exclude-layer", help="When a value is NaN or Inf.")
]
ReduceRange = Annotated[
    str,
    typer.Option(
        "--reduce-range",
        metavar="auto|on|off",
        help="7-bit weights; auto: on processors whose int8 products saturate.",
    ),
]
AllowQuantized = Annotated[
    bool, typer.Option("--allow-quantized", help="Take a model that is partly int8 already.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        show_default=False,
        help="Processes that share the samples (one thread each unless --threads says more).",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS|local",
        show_default=False,
        help="Ray actors (--workers of them) share the samples, on that cluster.",
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="DIR",
        show_default=False,
        help="Keeps progress there; the same command goes on where a killed one stopped.",
    ),
]
