"""Sessions whose weights stay on the disk: the model is written with external data, which ONNX Runtime maps."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.blocks.spool import Spool
from calib.model import Model
from calib.provider import SessionOptions, create_session
from onnxslim_ptq.export.files import write_model

__all__ = ["session_of"]


def session_of(model: Model, options: SessionOptions, spool: Spool | None) -> Any:
    """A session over ``model``; with ``spool`` one that takes no memory for weights (they are not packed, so slower).

    Handed over in memory, ONNX Runtime copies every weight and packs it; mapped from a file that lives in ``spool``,
    without packing, they are pages of the disk's cache.
    """
    if spool is None:
        return create_session(model.proto.SerializeToString(), model.weights, options=options)
    folder = Path(
        tempfile.mkdtemp(dir=spool.folder)
    )  # goes with the spool; the session maps its files till then
    path = folder / "model.onnx"
    write_model(model, path, external=True)
    return create_session(path, options=replace(options, prepack=False, frugal=True))
