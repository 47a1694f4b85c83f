"""The front door to files: lists a path, tells by their names what its files are, opens them as one data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.errors import CalibrationError
from calib.readers.arrays import open_arrays
from calib.readers.images import IMAGE_SUFFIXES, open_images
from calib.readers.limits import DEFAULT_LIMITS, ReadLimits, check_limit, label
from calib.readers.mix import chain
from calib.readers.preprocess import ImagePreprocess
from calib.readers.text import TEXT_SUFFIXES, TextSettings, open_text
from calib.types import Dataset, InputInfo

__all__ = ["HowToRead", "kind_of", "open_data"]

_KINDS = {
    **dict.fromkeys((".npy", ".npz"), "arrays"),
    **dict.fromkeys(IMAGE_SUFFIXES, "images"),
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
}


@dataclass(frozen=True)
class HowToRead:
    """What files do not say themselves. ``given``: the fields of ``image`` that the user set himself."""

    stacked: bool = False
    image: ImagePreprocess | None = None
    given: frozenset[str] = frozenset()
    text: TextSettings | None = None


def open_data(
    paths: Sequence[Path],
    inputs: Sequence[InputInfo],
    *,
    stacked: bool = False,
    limit: int | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
    how: HowToRead | None = None,
    said: list[str] | None = None,
) -> Dataset:
    """Open calibration files as one data set; samples are read and checked when iterated.

    A folder gives its files sorted by name, all of one kind; hidden files are ignored. An .npz is one sample, its
    arrays named like the model's inputs; one array serves a one-input model whatever its name. ``stacked``: the
    first axis of each array runs over samples, and each sample keeps a leading axis of 1. An image is one sample,
    a line of a .txt or .jsonl file too; ``how`` says what becomes of them, and what was decided is appended to
    ``said``. ``limit`` keeps the first samples only.

    Raises:
        CalibrationError: a path is missing or no sample file, there are no or too many samples, or (on
            iteration) a file is damaged, too large, or does not fit the model's inputs.
    """
    check_limit(limit)
    how = how or HowToRead(stacked)
    said = said if said is not None else []
    parts: list[Dataset] = []
    total = 0
    for kind, files in _groups(paths, limits):
        left = None if limit is None else limit - total
        if left == 0:
            break
        if kind == "arrays":
            part = open_arrays(files, inputs, how.stacked, left, limits)
        elif kind == "images":
            part = open_images(files[:left], inputs, how.image, how.given, limits, said)
        else:
            part = open_text(files, inputs, how.text, left, limits, said)
        parts.append(part)
        total += len(part)
    where = ", ".join(label(Path(path)) for path in paths) or "--calib"
    limits.check_count(total, where)
    if total == 0:
        raise CalibrationError(
            f"{where}: no samples; give a folder of .npz, .npy, image or text files, or such a file"
        )
    return chain([part for part in parts if len(part)], limits)


def _groups(paths: Sequence[Path], limits: ReadLimits) -> list[tuple[str, list[Path]]]:
    """Files in order, neighbours of one kind together."""
    groups: list[tuple[str, list[Path]]] = []
    for given in paths:
        path = Path(given)
        files = _listed(path, limits)
        kinds = {file: _kind(file) for file in files}
        odd = next((file for file in files if kinds[file] != kinds[files[0]]), None)
        if odd is not None:
            raise CalibrationError(
                f"{label(odd)}: not a sample file like {files[0].name!r} beside it; keep files of one kind "
                "in a folder, and pass several folders"
            )
        if not files:
            continue
        kind = kinds[files[0]]
        if groups and groups[-1][0] == kind:
            groups[-1][1].extend(files)
        else:
            groups.append((kind, files))
    return groups


def _listed(path: Path, limits: ReadLimits) -> list[Path]:
    if not path.exists():
        raise CalibrationError(
            f"{label(path)}: no such file or folder; check the path given to --calib or --eval"
        )
    if not path.is_dir():
        return [path]
    names: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    names.append(entry.name)
                    limits.check_count(len(names), label(path))
    except OSError as error:
        raise CalibrationError(
            f"{label(path)}: cannot be listed ({error.strerror}); check its permissions"
        ) from None
    return [path / name for name in sorted(names)]


def kind_of(path: Path) -> str:
    """What the files of a path that `open_data` took are: arrays, images or text."""
    return _kind(next(iter(_listed(path, DEFAULT_LIMITS))))


def _kind(path: Path) -> str:
    kind = _KINDS.get(path.suffix.lower())
    if path.is_dir():
        raise CalibrationError(f"{label(path)}: is a folder in a folder; pass it as a path of its own")
    if kind is None:
        raise CalibrationError(
            f"{label(path)}: not a sample file (.npz or .npy, {', '.join(IMAGE_SUFFIXES)}, "
            f"{' or '.join(TEXT_SUFFIXES)}); remove or convert it"
        )
    return kind
