"""Text to token arrays by a Hugging Face tokenizer file, under the input names that exporters give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import CalibrationError
from calib.readers.fill import initial_state, is_past
from calib.readers.limits import label, quoted
from calib.types import Array, Feed, InputInfo

__all__ = ["Encoder", "TextSettings", "complete"]

_IDS = "input_ids"
_MASK = ("attention_mask", "input_mask")
_TYPES = ("token_type_ids", "segment_ids")
_POSITIONS = ("position_ids",)
_MAX_FILE = 128 * 1024**2
_DEFAULT_LENGTH = 512
_PADS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "<|im_end|>", "</s>")


@dataclass(frozen=True)
class TextSettings:
    """How text becomes tokens.

    ``max_length`` None is the model's fixed length, or 512. ``padding`` None pads only when the model fixes the
    length; True pads to ``max_length``. ``pad_token`` None is the tokenizer's own.
    """

    tokenizer: Path
    max_length: int | None = None
    truncation: bool = True
    padding: bool | None = None
    pad_token: str | None = None
    add_special_tokens: bool = True


class Encoder:
    """Makes feeds of texts for the given inputs.

    Raises:
        CalibrationError: ``tokenizers`` is missing, the file is damaged, or the settings do not fit the model.
    """

    def __init__(self, settings: TextSettings, inputs: Sequence[InputInfo]) -> None:
        self._settings, self._inputs = settings, tuple(inputs)
        ids = next((info for info in inputs if info.name == _IDS), None)
        if ids is None:
            raise CalibrationError(
                f"text fills the input '{_IDS}', but the model's inputs are "
                f"{quoted(info.name for info in inputs)}; save .npz files or JSONL with these names"
            )
        fixed = ids.shape[-1] if ids.shape and isinstance(ids.shape[-1], int) else None
        self._length = _length(settings, fixed)
        self._pad_to = fixed or (self._length if settings.padding else None)
        self._tokenizer = _load(settings.tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if settings.truncation:
            self._tokenizer.enable_truncation(max_length=self._length)
        if self._pad_to is not None:
            self._pad()
        self._past = {info.name: initial_state(info) for info in inputs if is_past(info.name)}

    def __reduce__(self) -> tuple[type[Encoder], tuple[TextSettings, tuple[InputInfo, ...]]]:
        return Encoder, (self._settings, self._inputs)  # a worker reads the file itself

    def __str__(self) -> str:
        cut = f"at most {self._length} tokens" if self._settings.truncation else "never cut"
        padded = f"padded to {self._pad_to}" if self._pad_to else "not padded"
        return f"tokenizer {self._settings.tokenizer.name}, {cut}, {padded}" + (
            f", {len(self._past)} empty past inputs" if self._past else ""
        )

    def _pad(self) -> None:
        own: dict[str, Any] = self._tokenizer.padding or {}
        names = [self._settings.pad_token] if self._settings.pad_token else [own.get("pad_token"), *_PADS]
        found = next((n for n in names if n and self._tokenizer.token_to_id(n) is not None), None)
        if found is None:
            raise CalibrationError(
                f"{label(self._settings.tokenizer)}: padding needs a pad token, none of "
                f"{quoted(n for n in names if n)} is in the vocabulary; set data.text.pad_token"
            )
        self._tokenizer.enable_padding(
            length=self._pad_to, pad_id=self._tokenizer.token_to_id(found), pad_token=found
        )

    def encode(self, text: str, where: str) -> Feed:
        """The feed of one text, batch 1; CalibrationError when it is too long and may not be cut."""
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=self._settings.add_special_tokens)
        except Exception as error:
            raise CalibrationError(f"{where}: the tokenizer refuses it ({error}); check the text") from None
        longest = self._pad_to or self._length
        if not encoding.ids or len(encoding.ids) > longest:
            raise CalibrationError(
                f"{where}: gives {len(encoding.ids)} tokens, not 1 to {longest}; "
                "set data.text.truncation or raise max_length"
                if encoding.ids
                else f"{where}: gives no token; remove the line"
            )
        feed = _filled(self._inputs, encoding.ids, encoding.attention_mask, encoding.type_ids)
        return {**feed, **self._past}


def complete(feed: Feed, inputs: Sequence[InputInfo]) -> Feed:
    """A feed of token ids with the inputs that follow from them, where it lacks them: mask, positions, empty past."""
    ids = feed.get(_IDS)
    if ids is None or ids.ndim == 0 or (ids.ndim > 1 and ids.shape[0] != 1):
        return feed
    row: list[int] = ids.reshape(-1).tolist()
    mask = next((feed[name].reshape(-1).tolist() for name in _MASK if name in feed), [1] * len(row))
    past = {info.name: initial_state(info) for info in inputs if is_past(info.name) and info.name not in feed}
    return {**_filled(inputs, row, mask, [0] * len(row)), **past, **feed}


def _filled(
    inputs: Sequence[InputInfo], ids: list[int], mask: list[int], types: list[int]
) -> dict[str, Array]:
    # Positions count real tokens only, as decoders padded on the left want it.
    positions = np.maximum(np.cumsum(mask) - 1, 0)
    rows: dict[str, Any] = {
        _IDS: ids,
        **dict.fromkeys(_MASK, mask),
        **dict.fromkeys(_TYPES, types),
        **dict.fromkeys(_POSITIONS, positions),
    }
    feed: dict[str, Array] = {}
    for info in inputs:
        if info.name in rows:
            flat = np.asarray(rows[info.name]).astype(info.dtype)
            feed[info.name] = flat if info.shape is not None and len(info.shape) == 1 else flat[None]
    return feed


def _length(settings: TextSettings, fixed: int | None) -> int:
    if fixed is not None and settings.max_length is not None and settings.max_length > fixed:
        raise CalibrationError(
            f"data.text.max_length: is {settings.max_length}, but the model takes {fixed} tokens; leave it out"
        )
    return settings.max_length or fixed or _DEFAULT_LENGTH


def _load(path: Path) -> Any:
    where = label(path)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise CalibrationError(
            f"{where}: reading text needs tokenizers; pip install 'onnxslim_ptq[text]'"
        ) from None
    if not path.is_file():
        raise CalibrationError(
            f"{where}: no such tokenizer file; give the tokenizer.json that belongs to the model"
        )
    if path.stat().st_size > _MAX_FILE:
        raise CalibrationError(f"{where}: larger than {_MAX_FILE:,} bytes, no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except BaseException as error:  # a damaged file can end in a panic, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(f"{where}: not a tokenizer file ({reason}); give a tokenizer.json") from None
