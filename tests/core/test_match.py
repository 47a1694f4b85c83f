"""What the three kinds of pattern match, and the hints when one matches nothing."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_ptq.core.groups import GroupKind
from onnxslim_ptq.core.match import Layer, Pattern, nearest

HEAD = Layer("/lm_head/MatMul", "MatMul", "model.lm_head.weight", "MatMul_17")


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("*lm_head*", True),
        ("/lm_head/MatMul", True),
        ("/LM_HEAD/*", False),
        ("lm_head", False),
        ("model.lm_head.weight", True),
        ("MatMul_1?", True),
        ("MatMul_[0-9]", False),
        ("re:.*lm_.*", True),
        ("re:lm_head", False),
        (r"re:MatMul_\d+", True),
        ("re:(?i)/LM_HEAD/.*", True),
        ("op:MatMul", True),
        ("op:matmul", False),
        ("op:Mat*", False),
        ("MatMul", False),
    ],
)
def test_matches(text: str, matches: bool) -> None:
    assert Pattern.parse(text).matches(HEAD) is matches


def test_names_with_brackets_and_colons() -> None:
    layer = Layer("block[0]/conv:0", "Conv")
    assert Pattern.parse("block[0]/conv:0").matches(layer)
    assert Pattern.parse("block[[]0]*").matches(layer)
    assert not Pattern.parse("block[0]*").matches(layer)


def test_absent_names_match_nothing() -> None:
    assert not Pattern.parse("re:b?").matches(Layer("a", "Conv"))


@pytest.mark.parametrize("text", ["", " ", "re:", "op:", "op: "])
def test_empty(text: str) -> None:
    with pytest.raises(ValueError, match="is empty; use a glob, re:<regular expression> or op:<operator>"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["re:(", "re:*a", "re:[z-a]", "re:a{99999999999}"])
def test_bad_regular_expression(text: str) -> None:
    with pytest.raises(ValueError, match="is not a regular expression: "):
        Pattern.parse(text)


@given(st.text(st.characters(codec="ascii"), min_size=1), st.text(st.sampled_from("ab*?[]!"), min_size=1))
def test_globs_are_fnmatch(name: str, text: str) -> None:
    expected = fnmatch.fnmatchcase(name, text) or name == text
    assert Pattern.parse(text).matches(Layer(name, "Conv")) is expected


@given(
    st.text(min_size=1).filter(str.strip).filter(lambda name: not name.startswith(("re:", "op:", "group:")))
)
def test_every_name_matches_itself(name: str) -> None:
    assert Pattern.parse(name).matches(Layer(name, "Conv"))


LAYERS = [
    *(Layer(f"/model/layers.{i}/{part}_proj/MatMul", "MatMul") for i in range(4) for part in ("q", "down")),
    HEAD,
    Layer("stem", "Conv"),
]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("*lm_haed*", "nearest: '/lm_head/MatMul'"),
        ("*down_porj*", "nearest: '/model/layers.0/down_proj/MatMul'"),
        ("/model/layers.9/q_proj/MatMul", "nearest: '/model/layers."),
        (r"re:.*/lm_heads/.*", "nearest: '/lm_head/MatMul'"),
        ("MatMul_71", "'/lm_head/MatMul'"),
        ("op:Gemm", "the operators are Conv, MatMul"),
        ("zzzzz", "layers are named like: '/model/layers.0/q_proj/MatMul', "),
        ("*", "layers are named like: "),
    ],
)
def test_nearest(text: str, hint: str) -> None:
    assert hint in nearest(Pattern.parse(text), LAYERS)
    assert nearest(Pattern.parse(text), LAYERS).count("'") <= 6


def test_nearest_of_nothing() -> None:
    assert nearest(Pattern.parse("a"), []) == "the model has no layer that can be quantized"


def test_groups() -> None:
    layer = Layer("fc", "MatMul", group=GroupKind.UP_DOWN)
    assert Pattern.parse("group:up-down").matches(layer)
    assert not Pattern.parse("group:ov").matches(layer)
    assert not Pattern.parse("group:up-down").matches(Layer("fc", "MatMul"))
    assert [Pattern.parse(text).may_miss for text in ("*", "group:ov", "*fc*", "op:Gemm")] == [
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(ValueError, match="'group:updown' names no kind of group; use one of norm-linear, "):
        Pattern.parse("group:updown")
