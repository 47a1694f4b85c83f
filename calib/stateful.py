"""Runs the float model step by step, for data whose states come from its own outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calib.model import Model
from calib.provider import SessionOptions, create_session
from calib.readers.feedback import Run
from calib.runner import run_session, tap
from calib.types import Array, Feed, SampleId

__all__ = ["Steps"]


@dataclass(frozen=True)
class Steps:
    """Calling it makes a session of ``model`` and gives the function that runs one step of it."""

    model: Model
    outputs: Sequence[str]
    threads: int = 0

    def __call__(self) -> Run:
        skeleton = tap(self.model, self.outputs)
        for node in skeleton.graph.node:
            node.ClearField("name")  # ONNX Runtime refuses nodes of the same name, and nobody reads these
        options = SessionOptions(threads=self.threads, frugal=True)
        session = create_session(skeleton.SerializeToString(), self.model.weights, options=options)

        def run(feed: Feed, sample: SampleId) -> Mapping[str, Array]:
            return dict(zip(self.outputs, run_session(session, self.outputs, feed, sample), strict=True))

        return run
