"""A session on an accelerator that is believed only after it was checked; lives in the child process."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calib.devices.placement import (
    Placement,
    compare,
    placement_from_profile,
    placement_from_session,
    require_placed,
)
from calib.devices.table import Device
from calib.errors import DeviceError, GraphError
from calib.provider import Optimize, SessionOptions, new_session, one_line, runtime
from calib.types import Array, Feed

__all__ = ["CheckedSession", "DeviceFailure"]

_SESSIONS = 8  # input shapes whose compiled models are kept
Key = tuple[tuple[str, tuple[int, ...]], ...]


class DeviceFailure(Exception):
    """ONNX Runtime failed on the device: ``what`` happened, and its own text, which needs an explanation."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(text)
        self.what = what


class CheckedSession:
    """Runs a model on ``device``: never on another one, and not before its first result was compared with the CPU's.

    Where the device wants fixed shapes there is one session per set of input shapes (the last 8 are kept), each
    checked on its own. ``notes`` collects lines for the user.

    Raises DeviceFailure when the device is not there or fails, DeviceError when it takes nothing of the model or
    computes something else than the CPU, GraphError when ONNX Runtime refuses the model, and what the CPU raises when
    a sample does not fit.
    """

    def __init__(
        self, model: bytes, weights: Mapping[str, Array], device: Device, options: SessionOptions
    ) -> None:
        self._ort, self._device, self._weights = runtime(), device, weights
        self._proto = onnx.ModelProto.FromString(model)
        self._options = options
        if device.accelerator.basic and options.optimize != Optimize.OFF:
            self._options = replace(options, optimize=Optimize.BASIC)
        self._sessions: OrderedDict[Key, Any] = OrderedDict()
        self._shapes_seen: set[Key] = set()
        self.notes: list[str] = []
        data = self._proto.SerializeToString()
        try:
            plain = self._on_cpu(data)
        except Exception as error:
            raise GraphError(
                f"ONNX Runtime {self._ort.__version__} cannot load the model: {one_line(error)}"
            ) from None
        self.inputs = [(i.name, i.type, list(i.shape)) for i in plain.get_inputs()]
        self.outputs = [(o.name, o.type, list(o.shape)) for o in plain.get_outputs()]
        del plain
        self._spare: tuple[bytes, Any] | None = (data, self._on_device(data))

    @property
    def providers(self) -> list[str]:
        return [self._device.provider]

    def run(self, outputs: Sequence[str], feed: Feed) -> list[Array]:
        """The values of ``outputs``, as ``InferenceSession.run`` gives them."""
        fixed = self._device.accelerator.fixed_shapes
        key: Key = tuple(sorted((n, v.shape) for n, v in feed.items())) if fixed else ()
        session = self._sessions.get(key)
        if session is None:
            return self._first_run(key, outputs, feed)
        self._sessions.move_to_end(key)
        try:
            found: list[Array] = session.run(outputs, feed)
            return found
        except Exception as error:
            self._on_cpu(self._fixed(feed) if fixed else self._proto.SerializeToString()).run(outputs, feed)
            raise DeviceFailure("failed", str(error)) from None

    def _first_run(self, key: Key, outputs: Sequence[str], feed: Feed) -> list[Array]:
        data = self._fixed(feed) if self._device.accelerator.fixed_shapes else self._proto.SerializeToString()
        exact = self._on_cpu(data).run(outputs, feed)  # first: what fails here is the sample's fault
        while len(self._sessions) >= _SESSIONS:
            self._sessions.popitem(last=False)
        spare, self._spare = self._spare, None
        session = spare[1] if spare is not None and spare[0] == data else self._on_device(data)
        try:
            found: list[Array] = session.run(outputs, feed)
        except Exception as error:
            raise DeviceFailure("failed at its first run", str(error)) from None
        placement = self._placement(session)
        require_placed(placement, str(self._device))
        compare(outputs, found, exact, str(self._device))
        self._sessions[key] = session
        self._note(key, placement)
        return found

    def _placement(self, session: Any) -> Placement:
        if self._records_placement:
            return placement_from_session(session, self._device.provider)
        return placement_from_profile(Path(session.end_profiling()), self._device.provider)

    def _note(self, key: Key, placement: Placement) -> None:
        note = placement.note(str(self._device)) if not self._shapes_seen else None
        if note:
            self.notes.append(note)
        self._shapes_seen.add(key)
        if len(self._shapes_seen) == _SESSIONS + 1:
            self.notes.append(
                f"device '{self._device}': more than {_SESSIONS} input shapes; the model is compiled anew for each, "
                "so crop or pad the samples to a few shapes"
            )

    @property
    def _records_placement(self) -> bool:
        return hasattr(self._ort.InferenceSession, "get_provider_graph_assignment_info")

    def _on_cpu(self, data: bytes) -> Any:
        options = replace(self._options, frugal=True)
        return new_session(self._ort, data, self._weights, options, ["CPUExecutionProvider"])

    def _on_device(self, data: bytes) -> Any:
        provider = self._device.provider
        numbers = re.findall(r"\d+", self._ort.__version__)
        forms = self._device.accelerator.options(self._device.index, (int(numbers[0]), int(numbers[1])))
        for last, form in enumerate(forms, 1 - len(forms)):
            try:
                session = self._try(data, provider, form)
                break
            except Exception as error:
                if last == 0 or "Unknown provider option" not in str(error):
                    raise DeviceFailure("is not available", str(error)) from None
        if provider not in session.get_providers():
            raise DeviceFailure(
                "is not available",
                f"ONNX Runtime put the session on {', '.join(session.get_providers())} without an error",
            )
        taken = session.get_provider_options().get(provider, {})
        ignored = [f"{k}={v}" for k, v in form.items() if str(taken.get(k, "")) != v]
        if ignored:
            raise DeviceError(
                f"device '{self._device}': the provider ignores {', '.join(ignored)}, so its statistics would be "
                "wrong; install another version of it, or use --device cpu"
            )
        return session

    def _try(self, data: bytes, provider: str, form: Mapping[str, str]) -> Any:
        return new_session(
            self._ort,
            data,
            self._weights,
            self._options,
            [(provider, dict(form))],
            record=self._records_placement,
            profile=not self._records_placement,
        )

    def _fixed(self, feed: Feed) -> bytes:
        """The model with the open dimensions of its inputs set as in ``feed``; a declared size is never changed."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        for value in proto.graph.input:
            array = feed.get(value.name)
            dims = value.type.tensor_type.shape.dim
            if array is None or len(dims) != np.ndim(array):
                continue
            for dim, size in zip(dims, np.shape(array), strict=True):
                if not dim.HasField("dim_value") or dim.dim_value < 0:
                    dim.dim_value = size
        return bytes(proto.SerializeToString())
