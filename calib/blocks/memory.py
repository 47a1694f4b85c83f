"""How much memory this process may still take: the machine's, its container's and its own limits."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["available_memory", "release_memory"]

_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


def available_memory() -> int | None:
    """Bytes that can be taken now, by the tightest limit that is known; None where none is (not Linux).

    Machine: MemAvailable of /proc/meminfo. Container: limit - usage + inactive_file (page cache, which the kernel
    takes back) of this process's memory cgroup and all above it, v2 and v1. Process: RLIMIT_DATA - VmData and
    RLIMIT_AS - VmSize.
    """
    machine = _kilobytes(Path("/proc/meminfo"), "MemAvailable:")
    found = [*([] if machine is None else [machine]), *_containers(), *_process()]
    return max(min(found), 0) if found else None


def release_memory() -> None:
    """Give memory that was freed back to the system: the GNU C library keeps much of it for later."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _process() -> Iterator[int]:
    try:
        import resource
    except ImportError:  # Windows
        return
    for limit, used in ((resource.RLIMIT_DATA, "VmData:"), (resource.RLIMIT_AS, "VmSize:")):
        soft = resource.getrlimit(limit)[0]
        taken = _kilobytes(Path("/proc/self/status"), used)
        if soft != resource.RLIM_INFINITY and taken is not None:
            yield soft - taken


def _containers() -> Iterator[int]:
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = Path(os.path.normpath(f"{root}/{path}"))
        # Inside a container the path may name a folder of the host; the root then shows the container's own.
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                yield from _room(group, *names)


def _room(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    most, used = _text(group / limit).strip(), _text(group / usage).strip()
    if most.isdigit() and used.isdigit() and int(most) < _UNLIMITED:
        lines = (line.split() for line in _text(group / "memory.stat").splitlines())
        yield int(most) - int(used) + sum(int(words[1]) for words in lines if words[:1] == [cache])


def _kilobytes(path: Path, name: str) -> int | None:
    for line in _text(path).splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""
