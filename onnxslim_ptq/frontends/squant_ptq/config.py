"""The 28 arguments of squant_ptq's QuantConfig, their checks, and what they mean as a recipe."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxslim_ptq.frontends.ascend import exactly
from onnxslim_ptq.frontends.checks import (
    require_choice,
    require_int,
    require_names,
    require_shapes,
    require_type,
)
from onnxslim_ptq.frontends.squant_ptq.structures import STRUCTURES
from onnxslim_ptq.recipe import Recipe

__all__ = ["QuantConfig"]

_LOG = logging.getLogger("onnxslim_ptq")
_OPS = ("Conv", "Gemm", "MatMul")
_STRATEGIES = ("admm", "easy_quant", "round_opt")
_FLAGS = (
    *(
        "w_signed",
        "a_signed",
        "w_sym",
        "a_sym",
        "act_quant",
        "is_fp",
        "disable_first_layer",
        "disable_last_layer",
    ),
    *("is_optimize_graph", "is_dynamic_shape", "use_onnx"),
)
_MOST_ROUNDS = 100_000
_ADMM_ROUNDS = 1000


def _off() -> dict[str, Any]:
    return {"admm": [False, 1000], "easy_quant": [False, 1000], "round_opt": False}


@dataclass
class QuantConfig:
    """Arguments, order and defaults of msModelSlim 26.1.0; docs/msmodelslim-onnx.md says what each does here.

    Raises:
        TypeError: an argument has the wrong type, or a bit width other than 8.
        ValueError: a value outside its choices, or a key of ``keep_acc`` missing or unknown.
    """

    w_bit: int = 8
    a_bit: int = 8
    w_signed: bool = True
    a_signed: bool = False
    w_sym: bool = True
    a_sym: bool = False
    input_shape: Sequence[Sequence[int]] | None = None
    act_quant: bool = True
    act_method: int = 0
    quant_mode: int = 0
    disable_names: Sequence[str] | None = None
    amp_num: int = 0
    squant_mode: str = "squant"
    keep_acc: dict[str, Any] | None = field(default_factory=_off)
    sigma: int = 25
    is_fp: bool = False
    disable_first_layer: bool = True
    disable_last_layer: bool = True
    is_optimize_graph: bool = True
    is_dynamic_shape: bool = False
    use_onnx: bool = True
    num_input: int = 0
    quant_param_ops: Sequence[str] | None = None
    atc_input_shape: str | None = None
    graph_optimize_level: int = 0
    shut_down_structures: Sequence[str] | None = None
    device_id: int = 0
    om_method: str = "aoe"

    def __post_init__(self) -> None:
        for name in ("w_bit", "a_bit"):
            value = getattr(self, name)
            if isinstance(value, bool) or value != 8:
                raise TypeError(f"{name} must be 8, please check it.")
        for name in _FLAGS:
            require_type(name, getattr(self, name), bool)
        require_choice("act_method", self.act_method, (0, 1, 2))
        require_choice("quant_mode", self.quant_mode, (0, 1))
        require_choice("sigma", self.sigma, (0, 25))
        require_choice("squant_mode", self.squant_mode, ("squant", "squant-e", "squant-k", "squant-c"))
        require_choice("graph_optimize_level", self.graph_optimize_level, (0, 1, 2))
        require_choice("om_method", self.om_method, ("aoe", "atc"))
        require_int("amp_num", self.amp_num, 0)
        require_int("num_input", self.num_input, 0)
        require_int("device_id", self.device_id, 0, 7)
        self._check_lists()
        self._check_keep_acc()
        if not self.w_sym:
            _LOG.warning("w_sym=False: Ascend's int8 weights have no offset, so they stay symmetric")

    def _check_lists(self) -> None:
        self.disable_names = [] if self.disable_names is None else self.disable_names
        require_names("disable_names", self.disable_names)
        self.quant_param_ops = list(_OPS) if self.quant_param_ops is None else self.quant_param_ops
        require_names("quant_param_ops", self.quant_param_ops)
        for op in self.quant_param_ops:
            require_choice("an item of quant_param_ops", op, _OPS)
        self.shut_down_structures = [] if self.shut_down_structures is None else self.shut_down_structures
        require_names("shut_down_structures", self.shut_down_structures)
        for name in self.shut_down_structures:
            if name not in STRUCTURES:
                raise ValueError(
                    f"shut_down_structures: {name} is unknown; use some of {', '.join(STRUCTURES)}."
                )
        self.input_shape = [] if self.input_shape is None else self.input_shape
        require_shapes(self.input_shape, self.is_dynamic_shape)
        if self.atc_input_shape is not None:
            require_type("atc_input_shape", self.atc_input_shape, str)

    def _check_keep_acc(self) -> None:
        self.keep_acc = _off() if self.keep_acc is None else self.keep_acc
        require_type("keep_acc", self.keep_acc, dict)
        for name in _STRATEGIES:
            if name not in self.keep_acc:
                raise ValueError(f"{name} should be in keep_accuracy")
        if unknown := set(self.keep_acc) - set(_STRATEGIES):
            raise ValueError(f"keep_acc: {', '.join(sorted(map(str, unknown)))} is unknown.")
        for name in ("admm", "easy_quant"):
            value = self.keep_acc[name]
            if not isinstance(value, list | tuple) or len(value) != 2:
                raise TypeError(f"keep_acc['{name}'] must be [bool, int], not {value!r}.")
            require_type(f"keep_acc['{name}'][0]", value[0], bool)
            require_int(f"keep_acc['{name}'][1]", value[1], 1, _MOST_ROUNDS)
        require_type("keep_acc['round_opt']", self.keep_acc["round_opt"], bool)

    @property
    def label_free(self) -> bool:
        return self.quant_mode == 1

    def rounds(self, strategy: str) -> int:
        """How many rounds a strategy of ``keep_acc`` may take; 0: it is off."""
        assert self.keep_acc is not None
        on, rounds = self.keep_acc[strategy]
        return int(rounds) if on else 0

    def recipe(self, disabled: Iterable[str], ops: Iterable[str], passes: Sequence[str]) -> Recipe:
        """The recipe for layers of the types ``ops``, with the nodes ``disabled`` left float.

        Weights: data-free SQuant, label-free nearest codes, or SQuant with round_opt; admm fits the scale by least
        squares first. Activations: the range ``msmodelslim``. ValueError when act_method needs samples.
        """
        if self.act_method != 0 and not self.label_free:
            raise ValueError(
                f"act_method = {self.act_method} looks at samples: set quant_mode=1 (label-free)."
            )
        assert self.keep_acc is not None
        admm, flips = self.rounds("admm"), not self.label_free or self.keep_acc["round_opt"]
        rounder: dict[str, Any] = {"type": "squant", "fit_scale": True} if admm else {"type": "squant"}
        if not flips:
            rounder = {"type": "ssz", "steps": min(admm, _ADMM_ROUNDS)} if admm else {"type": "rtn"}
        start = {
            False: "sigma" if self.sigma else "minmax",
            True: "histogram" if self.act_method == 2 else "ema",
        }
        found = {
            "type": "msmodelslim",
            "start": start[self.label_free],
            "easy_quant": self.rounds("easy_quant"),
        }
        step = {
            "type": "quantize",
            "include": [f"op:{op}" for op in sorted(ops)],
            "exclude": exactly(disabled),
            "rounder": rounder,
            "act": {"symmetric": self.a_sym, "range": found},
            "bias_correction": False,
        }
        return Recipe.load({"version": 1, "target": "ascend", "passes": [*passes], "steps": [step]})
