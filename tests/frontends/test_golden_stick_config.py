"""PTQConfig and its algorithms' configs: defaults, every rule with its exception, files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from onnxslim_ptq.frontends.golden_stick import (
    AWQConfig,
    BackendTarget,
    GPTQQuantConfig,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
    QuantGranularity,
    SmoothQuantConfig,
    int4,
    int8,
)

GPTQ = PrecisionRecovery.GPTQ
PER_TOKEN, PER_GROUP = QuantGranularity.PER_TOKEN, QuantGranularity.PER_GROUP
DEPLOY = PTQMode.DEPLOY


@dataclass
class Own:
    alpha: float = 0.8


def test_defaults() -> None:
    assert PTQConfig() == PTQConfig(
        PTQMode.QUANTIZE,
        BackendTarget.ASCEND,
        [],
        {},
        int8,
        None,
        None,
        PrecisionRecovery.NONE,
        OutliersSuppressionType.NONE,
        QuantGranularity.PER_CHANNEL,
        QuantGranularity.PER_CHANNEL,
        QuantGranularity.PER_TENSOR,
        0,
    )


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        (
            {"mode": "quantize"},
            ValueError,
            "mode: got 'quantize'; use one of PTQMode.QUANTIZE, PTQMode.DEPLOY",
        ),
        ({"mode": BackendTarget.NONE}, ValueError, "mode"),
        ({"backend": "ascend"}, ValueError, "backend"),
        ({"backend": PTQMode.QUANTIZE}, ValueError, "backend"),
        ({"weight_quant_dtype": "int8"}, ValueError, "weight_quant_dtype"),
        ({"kvcache_quant_dtype": int4}, ValueError, "kvcache_quant_dtype"),
        ({"act_quant_dtype": ["1"]}, ValueError, "act_quant_dtype"),
        ({"act_quant_dtype": int4}, ValueError, "act_quant_dtype"),
        ({"opname_blacklist": "w2"}, TypeError, "opname_blacklist"),
        ({"opname_blacklist": ["w2", 1]}, TypeError, "opname_blacklist"),
        ({"outliers_suppression": None}, TypeError, "outliers_suppression"),
        ({"outliers_suppression": "smooth"}, TypeError, "outliers_suppression"),
        ({"group_size": 64.0}, TypeError, "group_size"),
        ({"group_size": True}, ValueError, "group_size: True goes with PER_GROUP only"),
        ({"act_quant_granularity": QuantGranularity.PER_CHANNEL}, ValueError, "act_quant_granularity"),
        ({"weight_quant_granularity": PER_TOKEN}, ValueError, "weight_quant_granularity"),
        ({"kvcache_quant_granularity": PER_GROUP}, ValueError, "kvcache_quant_granularity"),
        ({"act_quant_granularity": PER_TOKEN}, ValueError, "PER_TOKEN needs act_quant_dtype=int8"),
        (
            {"act_quant_granularity": PER_TOKEN, "act_quant_dtype": int8, "weight_quant_dtype": None},
            ValueError,
            "PER_TOKEN needs",
        ),
        (
            {"act_quant_dtype": int8, "weight_quant_granularity": PER_GROUP, "group_size": 64},
            ValueError,
            "W8A8 takes PER_CHANNEL only",
        ),
        ({"kvcache_quant_granularity": PER_TOKEN}, ValueError, "needs kvcache_quant_dtype=int8"),
        ({"group_size": 64}, ValueError, "goes with PER_GROUP only"),
        ({"weight_quant_granularity": PER_GROUP}, ValueError, "PER_GROUP takes 64 or 128, got 0"),
        ({"weight_quant_granularity": PER_GROUP, "group_size": 32}, ValueError, "64 or 128"),
        ({"weight_quant_dtype": int4, "act_quant_dtype": int8}, ValueError, "int4 weights with int8"),
        (
            {
                "weight_quant_dtype": int4,
                "act_quant_dtype": int8,
                "act_quant_granularity": PER_TOKEN,
                "algo_args": {"a": 1},
            },
            ValueError,
            "precision_recovery=GPTQ",
        ),
        ({"precision_recovery": None}, TypeError, "precision_recovery"),
        ({"precision_recovery": "gptq"}, TypeError, "precision_recovery"),
        ({"algo_args": None}, ValueError, "algo_args"),
        ({"algo_args": ["alpha"]}, ValueError, "algo_args"),
        ({"algo_args": Own}, TypeError, "is a class"),
        ({"weight_qant_dtype": int8}, TypeError, "unexpected keyword"),
    ],
)
def test_rejected(fields: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        PTQConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"mode": 1, "backend": 1}, ValueError, "mode"),
        ({"act_quant_dtype": 1, "opname_blacklist": 1}, ValueError, "act_quant_dtype"),
        ({"opname_blacklist": 1, "outliers_suppression": 1}, TypeError, "opname_blacklist"),
        ({"group_size": "1", "act_quant_granularity": 1}, TypeError, "group_size"),
        ({"precision_recovery": 1, "algo_args": 1}, TypeError, "precision_recovery"),
    ],
)
def test_the_first_broken_rule_is_named(fields: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        PTQConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"kvcache_quant_dtype": int8, "kvcache_quant_granularity": PER_TOKEN},
        {"act_quant_dtype": int8, "act_quant_granularity": PER_TOKEN},
        {
            "act_quant_dtype": int8,
            "act_quant_granularity": PER_TOKEN,
            "weight_quant_dtype": int4,
            "precision_recovery": GPTQ,
            "algo_args": {"desc_act": True},
        },
        {
            "act_quant_dtype": int8,
            "act_quant_granularity": PER_TOKEN,
            "weight_quant_dtype": int4,
            "precision_recovery": GPTQ,
            "algo_args": {"desc_act": True},
            "weight_quant_granularity": PER_GROUP,
            "group_size": 128,
        },
        {"weight_quant_dtype": None},
        {"act_quant_dtype": int8, "weight_quant_dtype": None},
        {"weight_quant_dtype": int4, "kvcache_quant_dtype": int8},
        {"opname_blacklist": ("a", "b"), "group_size": False, "algo_args": {"foo": 1}},
    ],
)
def test_accepted(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PTQConfig(mode=DEPLOY, **fields)


def test_warnings() -> None:
    with pytest.warns(UserWarning, match="needs no QUANTIZE run"):
        PTQConfig(kvcache_quant_dtype=int8, kvcache_quant_granularity=PER_TOKEN)
    with pytest.warns(UserWarning, match="GPTQ uses GPTQQuantConfig"):
        filled = PTQConfig(weight_quant_dtype=int4, precision_recovery=GPTQ)
    assert filled.algo_args == vars(GPTQQuantConfig())
    with pytest.warns(UserWarning, match="precision_recovery is not GPTQ"):
        PTQConfig(algo_args=GPTQQuantConfig())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_mean_the_same(copied: Callable[[PTQConfig], PTQConfig]) -> None:
    config = copied(PTQConfig(act_quant_dtype=int8, kvcache_quant_dtype=int8))
    assert config.weight_quant_dtype is config.act_quant_dtype is config.kvcache_quant_dtype is int8


def test_arguments_become_a_dict() -> None:
    assert PTQConfig(algo_args=SmoothQuantConfig(0.8)).algo_args == {"alpha": 0.8}
    assert PTQConfig(algo_args=Own()).algo_args == {"alpha": 0.8}
    assert PTQConfig(algo_args={"foo": 1}).algo_args == {"foo": 1}


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: GPTQQuantConfig(block_size=1.0), TypeError),  # type: ignore[arg-type]
        (lambda: GPTQQuantConfig(desc_act=1), TypeError),  # type: ignore[arg-type]
        (lambda: GPTQQuantConfig(damp_percent=1), TypeError),
        (lambda: GPTQQuantConfig(static_groups="no"), TypeError),  # type: ignore[arg-type]
        (lambda: GPTQQuantConfig(block_size=-1), ValueError),
        (lambda: GPTQQuantConfig(damp_percent=-0.1), ValueError),
        (lambda: GPTQQuantConfig(damp_percent=1.1), ValueError),
        (lambda: AWQConfig(duo_scaling=1), TypeError),  # type: ignore[arg-type]
        (lambda: AWQConfig(smooth_alpha=1), TypeError),
        (lambda: AWQConfig(smooth_alpha="0.5"), TypeError),  # type: ignore[arg-type]
        (lambda: AWQConfig(weight_clip_ratio=(1.0, 0.9)), TypeError),  # type: ignore[arg-type]
        (lambda: AWQConfig(smooth_alpha=1.1), ValueError),
        (lambda: AWQConfig(smooth_alpha=[0.5, -0.1]), ValueError),
        (lambda: AWQConfig(weight_clip_ratio=[2.0]), ValueError),
        (lambda: SmoothQuantConfig(alpha=1), TypeError),
        (lambda: SmoothQuantConfig(alpha="0.5"), TypeError),  # type: ignore[arg-type]
    ],
)
def test_arguments_rejected(make: Callable[[], object], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        make()


def test_arguments_accepted() -> None:
    assert GPTQQuantConfig(block_size=0).damp_percent == 0.01
    assert AWQConfig().smooth_alpha == [i / 20 for i in range(20)]
    assert AWQConfig().weight_clip_ratio == [1 - i / 20 for i in range(10)]
    assert AWQConfig(smooth_alpha=[]).duo_scaling
    assert SmoothQuantConfig(7.0).alpha == 7.0


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        config = PTQConfig(
            mode=DEPLOY,
            backend=BackendTarget.NONE,
            opname_blacklist=["lm_head"],
            algo_args=GPTQQuantConfig(desc_act=True),
            weight_quant_dtype=int4,
            act_quant_dtype=int8,
            act_quant_granularity=PER_TOKEN,
            precision_recovery=GPTQ,
            weight_quant_granularity=PER_GROUP,
            group_size=64,
        )
        config.dump(tmp_path / "c.yaml")
        loaded = PTQConfig.load(tmp_path / "c.yaml")
        assert loaded == config
        assert loaded.weight_quant_dtype is int4
        assert loaded.kvcache_quant_dtype is None
        text = (tmp_path / "c.yaml").read_text()
        assert "mode: DEPLOY" in text
        assert "weight_quant_dtype: int4" in text

    @pytest.mark.parametrize(
        ("text", "kind", "words"),
        [
            ("mode: DEPLOYED", ValueError, "mode: 'DEPLOYED' is unknown"),
            ("weight_quant_dtype: int7", ValueError, "weight_quant_dtype: 'int7' is unknown"),
            ("[1, 2]", ValueError, "expected a mapping"),
            ("mod: DEPLOY", TypeError, "unexpected keyword"),
            ("a: {b: [", ValueError, "not YAML"),
            ("mode: [DEPLOY]", ValueError, "is unknown; use one of"),
            ("act_quant_dtype: [int8]", ValueError, "is unknown; use one of int8, int4 or null"),
        ],
    )
    def test_bad_files(self, text: str, kind: type[Exception], words: str, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(kind, match=words):
            PTQConfig.load(tmp_path / "c.yaml")

    def test_names_are_never_guessed(self) -> None:
        assert OutliersSuppressionType.from_str("Outlier-Suppression+").name == "OUTLIER_SUPPRESSION_PLUS"
        assert str(PER_TOKEN) == "per_token"
        for enum in (OutliersSuppressionType, PrecisionRecovery, QuantGranularity):
            with pytest.raises(ValueError, match=f"{enum.__name__}: 'smoth' is unknown"):
                enum.from_str("smoth")
