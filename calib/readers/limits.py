"""What one reader may consume, so that a hostile or mistaken file is an error and not a full machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.errors import CalibrationError

__all__ = ["DEFAULT_LIMITS", "ReadLimits", "check_limit", "label", "place_of", "quoted", "size_text"]


@dataclass(frozen=True)
class ReadLimits:
    """Upper bounds of reading: bytes of one decoded sample, samples in total, arrays in one file, and more by name.

    ``max_image_pixels`` is what Pillow warns from; ``max_line_bytes`` bounds a line of text.
    """

    max_sample_bytes: int = 2 * 1024**3
    max_samples: int = 1_000_000
    max_arrays: int = 1024
    max_image_pixels: int = 89_478_485
    max_line_bytes: int = 4 * 1024**2

    def check_bytes(self, nbytes: int, where: str, cure: str) -> None:
        """Refuse a sample of ``nbytes`` before any of it is allocated.

        Raises:
            CalibrationError: ``nbytes`` is above ``max_sample_bytes``.
        """
        if nbytes > self.max_sample_bytes:
            raise CalibrationError(
                f"{where}: one sample takes {size_text(nbytes)}, more than the "
                f"{size_text(self.max_sample_bytes)} allowed; {cure}"
            )

    def check_count(self, count: int, where: str) -> None:
        """Refuse more than ``max_samples`` samples.

        Raises:
            CalibrationError: ``count`` is above ``max_samples``.
        """
        if count > self.max_samples:
            raise CalibrationError(
                f"{where}: more than the {self.max_samples} samples allowed; "
                "a few hundred are enough, use fewer with --samples N"
            )


DEFAULT_LIMITS = ReadLimits()


def check_limit(limit: int | None) -> None:
    """Refuse a sample limit that would leave nothing.

    Raises:
        CalibrationError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise CalibrationError(f"--samples {limit}: must be at least 1")


def label(path: Path) -> str:
    """The path as text that stays on one line, whatever characters the file name holds."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def place_of(files: Sequence[Path]) -> str:
    """Where files lie, without what differs between machines: the name of the only file, or of the first's folder."""
    return label(Path(files[0].name if len(files) == 1 else files[0].absolute().parent.name))


def quoted(names: Iterable[str]) -> str:
    """The names quoted and separated by commas, for a message; long lists are cut."""
    shown = [repr(name) for name in names]
    return ", ".join(shown[:16]) + (f" and {len(shown) - 16} more" if len(shown) > 16 else "")


def size_text(nbytes: int) -> str:
    """A byte count in the largest unit that keeps it at 1 or above."""
    # Capped: a hostile shape multiplies to more than a float can hold.
    value, unit = float(min(nbytes, 1 << 70)), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
