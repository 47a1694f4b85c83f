"""The identity of a data set, for manifests and for statistics files."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from calib.types import Array, Dataset

__all__ = ["fingerprint"]


def fingerprint(data: Dataset) -> str:
    """The sha256 over tags, input names, dtypes, shapes and bytes of all samples in order.

    One sample is in memory at a time. The same values give the same text whether they came from files or from
    Python; file names do not count.
    """
    digest = hashlib.sha256()
    for ident, feed in data:
        digest.update(f"sample {sorted(ident.tags.items())} {len(feed)}\n".encode())
        for name in sorted(feed):
            content = _content(feed[name])
            digest.update(
                f"{name!r} {feed[name].dtype.name} {list(feed[name].shape)} {content.nbytes}\n".encode()
            )
            digest.update(content.data)
    return digest.hexdigest()


def _content(array: Array) -> NDArray[np.uint8]:
    if array.dtype.kind == "O":  # strings: each length first, so that no two lists give the same bytes
        texts = [str(item).encode() for item in array.flat]
        return np.frombuffer(b"".join(len(text).to_bytes(8, "little") + text for text in texts), np.uint8)
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return little.reshape(-1).view(np.uint8)
