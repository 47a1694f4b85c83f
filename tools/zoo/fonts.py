"""A fixed list of fonts, found on the machine or unpacked into the cache, so that rendering is repeatable."""

from __future__ import annotations

from pathlib import Path

from .cache import debian_package, package
from .case import ZooUnavailable

_SYSTEM = Path("/usr/share/fonts/truetype")
_DEJAVU = [
    f"DejaVu{face}.ttf" for face in ("Sans", "Sans-Bold", "SansMono", "SansMono-Bold", "Serif", "Serif-Bold")
]
_LIBERATION = [
    f"Liberation{family}-{style}.ttf"
    for family in ("Mono", "Sans", "Serif")
    for style in ("Regular", "Bold", "Italic", "BoldItalic")
]
_MATPLOTLIB = "matplotlib==3.10.8"


def font_files() -> list[Path]:
    """Six DejaVu and, where Debian packages can be had, twelve Liberation fonts, always in the same order."""
    dejavu = _find("dejavu", "fonts-dejavu-core", _DEJAVU)
    if not dejavu:
        folder = package(_MATPLOTLIB, compiled=True) / "matplotlib" / "mpl-data" / "fonts" / "ttf"
        dejavu = [folder / name for name in _DEJAVU]
    return dejavu + _find("liberation", "fonts-liberation", _LIBERATION)


def _find(folder: str, debian_name: str, wanted: list[str]) -> list[Path]:
    """All of `wanted` from the system or from the Debian package, else nothing."""
    files = [_SYSTEM / folder / name for name in wanted]
    if not all(file.exists() for file in files):
        try:
            unpacked = debian_package(debian_name)
        except ZooUnavailable:
            return []
        files = [next(unpacked.rglob(name), unpacked / name) for name in wanted]
    return files if all(file.exists() for file in files) else []
