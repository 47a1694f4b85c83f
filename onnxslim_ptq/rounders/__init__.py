"""Ways to choose the integer codes of a weight matrix (one file each), and the table of them."""

from __future__ import annotations

from onnxslim_ptq.core.rounding import Rounder
from onnxslim_ptq.rounders.adaround import AdaRound
from onnxslim_ptq.rounders.admm import Admm
from onnxslim_ptq.rounders.clip import Clip
from onnxslim_ptq.rounders.gptq import Gptq
from onnxslim_ptq.rounders.outcome import Outcome, never_worse
from onnxslim_ptq.rounders.rtn import Rtn
from onnxslim_ptq.rounders.squant import SQuant
from onnxslim_ptq.rounders.ssz import Ssz

__all__ = [
    "ROUNDERS",
    "AdaRound",
    "Admm",
    "Clip",
    "Gptq",
    "Outcome",
    "Rtn",
    "SQuant",
    "Ssz",
    "never_worse",
]

ROUNDERS: dict[str, type[Rounder]] = {
    "adaround": AdaRound,
    "admm": Admm,
    "clip": Clip,
    "gptq": Gptq,
    "rtn": Rtn,
    "squant": SQuant,
    "ssz": Ssz,
}
