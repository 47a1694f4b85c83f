"""Checks of paths as msModelSlim makes them where they protect the user, with its exception types."""

from __future__ import annotations

import logging
import os
import re
import stat
from pathlib import Path

__all__ = ["readable", "writable"]

_ALLOWED = re.compile(r"[_A-Za-z0-9/.\-]+")
_LONGEST_NAME, _LONGEST_PATH = 255, 4096
_LOG = logging.getLogger("onnxslim_ptq")


def readable(path: str | os.PathLike[str], suffix: str) -> Path:
    """``path`` as an existing, regular file; TypeError for another type, ValueError naming what is wrong with it.

    Characters: letters, digits, ``_ / . -``. The file itself must be no link and not writable by everybody.
    """
    found = _named(path, suffix, "Input")
    if not found.is_file():
        raise ValueError(f"Input path {found} is not a file; give the path of an existing {suffix} file.")
    if found.stat().st_mode & stat.S_IWOTH:
        raise ValueError(f"Input path {found} is writable by everybody; take that right away (chmod o-w).")
    if not os.access(found, os.R_OK):
        raise ValueError(f"Input path {found} is not readable; check its permissions.")
    return found


def writable(path: str | os.PathLike[str], suffix: str) -> Path:
    """``path`` as a file that can be written; TypeError, or ValueError as `readable`; warns when it exists."""
    found = _named(path, suffix, "Output")
    if not found.parent.is_dir():
        raise ValueError(f"Output folder {found.parent} does not exist; create it first.")
    if not os.access(found.parent, os.W_OK):
        raise ValueError(f"Output folder {found.parent} is not writable; check its permissions.")
    if found.is_dir():
        raise ValueError(f"Output path {found} is a folder; give a file name.")
    if found.exists():
        _LOG.warning("%s exists and is overwritten", found)
    return found


def _named(path: str | os.PathLike[str], suffix: str, kind: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{kind.lower()} path must be str, not {type(path).__name__}.")
    text = os.fspath(path)
    if not _ALLOWED.fullmatch(text):
        raise ValueError(
            f"{kind} path contains invalid characters. Allowed are letters, digits and _ / . -, not {text!r}."
        )
    found = Path(text)
    if len(found.name) > _LONGEST_NAME or len(text) > _LONGEST_PATH:
        raise ValueError(f"{kind} path is too long: {len(text)} characters.")
    if found.suffix != suffix:
        raise ValueError(f"{kind} path {found} must end in {suffix}.")
    if found.is_symlink():
        raise ValueError(f"{kind} path {found} is a link; give the file it points to.")
    return found
