"""The list of cases, and loading by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module

from .case import Case

# name -> (module, function, its arguments, needs a torch export)
_CASES: dict[str, tuple[str, str, tuple[str, ...], bool]] = {
    "rec": ("ocr", "load_rec", (), False),
    "cls": ("ocr", "load_cls", (), False),
    "det": ("ocr", "load_det", (), False),
    "effnet": ("effnet", "load", ("torchscript",), True),
    "effnet-dynamo": ("effnet", "load", ("dynamo",), True),
    "minilm": ("minilm", "load", (), True),
    "smollm2": ("smollm2", "load", (), True),
    "silero": ("silero", "load", ("silero",), False),
    "silero-16k-op15": ("silero", "load", ("silero-16k-op15",), False),
    "silero-half": ("silero", "load", ("silero-half",), False),
    "silero-op18-ifless": ("silero", "load", ("silero-op18-ifless",), False),
    "silero-openvino-16k": ("silero", "load", ("silero-openvino-16k",), False),
    "silero-16k-sequence": ("silero", "load", ("silero-16k-sequence",), False),
    "basic-pitch": ("basic_pitch", "load", (), False),
    "voicefilter-int8": ("voicefilter", "load", ("filter",), False),
    "voicefilter-embedder-int8": ("voicefilter", "load", ("embedder",), False),
}


def names() -> list[str]:
    """All cases, in the order in which they are worth trying."""
    return list(_CASES)


def native() -> list[str]:
    """The cases whose ONNX files ship inside packages, so that no torch is needed."""
    return [name for name, entry in _CASES.items() if not entry[3]]


def load(name: str) -> Case:
    """The case of that name, fetched, exported or rendered first where the cache lacks it."""
    if name not in _CASES:
        near = difflib.get_close_matches(name, _CASES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_CASES)}"
        raise ValueError(f"no zoo case {name!r}; {hint}")
    module, function, arguments, _ = _CASES[name]
    loader: Callable[..., Case] = getattr(import_module(f"{__package__}.{module}"), function)
    return loader(*arguments)
