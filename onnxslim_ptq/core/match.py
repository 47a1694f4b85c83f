"""Patterns that choose layers: a glob, or ``re:`` an expression, ``op:`` an operator, ``group:`` a kind of group."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from onnxslim_ptq.core.groups import GroupKind

__all__ = ["Layer", "Pattern", "literal", "nearest"]

_KINDS = ("re", "op", "group")


@dataclass(frozen=True)
class Layer:
    """What a pattern sees of a layer: node name, operator, weight initializer, the node's name in the file, the
    module it was in the training framework, and the kind of its smoothing group where that was asked for."""

    node: str
    op: str
    weight: str = ""
    original: str = ""
    module: str = ""
    group: GroupKind | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.node, self.original, self.weight, self.module) if name)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern; ``text`` is what the user wrote. Make it with `Pattern.parse`."""

    text: str
    op: str | None
    names: re.Pattern[str] | None
    group: GroupKind | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse a glob, ``re:…``, ``op:…`` or ``group:…``; ValueError when it is empty, no regular expression, or no
        kind of group."""
        kind, colon, rest = text.partition(":")
        if not colon or kind not in _KINDS:
            kind, rest = "glob", text
        if not rest.strip():
            raise ValueError(
                f"pattern {text!r} is empty; use a glob, re:<regular expression> or op:<operator>"
            )
        if kind == "op":
            return cls(text, rest, None)
        if kind == "group":
            kinds = [known.value for known in GroupKind]
            if rest not in kinds:
                raise ValueError(f"pattern {text!r} names no kind of group; use one of {', '.join(kinds)}")
            return cls(text, None, None, GroupKind(rest))
        try:
            return cls(text, None, re.compile(rest if kind == "re" else fnmatch.translate(rest)))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"pattern {text!r} is not a regular expression: {error}") from None

    def matches(self, layer: Layer) -> bool:
        """Whether the operator, or the whole of any of the layer's names, matches; case-sensitive.

        A glob also matches the name it equals literally, so that a name with brackets can be pasted as it is.
        """
        if self.group is not None:
            return layer.group is self.group
        if self.names is None:
            return layer.op == self.op
        return any(self.names.fullmatch(name) or name == self.text for name in layer.names)

    @property
    def may_miss(self) -> bool:
        """Whether matching no layer of a model is no mistake: it names no layer, so it has no name to mistype."""
        return self.text == "*" or self.group is not None


def literal(name: str) -> str:
    """A pattern that matches this name and, of one with wildcards or the prefix of a pattern in it, nothing else."""
    if not set(name) & set("*?[") and not name.startswith(tuple(f"{kind}:" for kind in _KINDS)):
        return name
    return "re:" + "".join(c if c.isalnum() or c in "_/-: " else f"\\{c}" for c in name)


def nearest(pattern: Pattern, layers: Sequence[Layer]) -> str:
    """The end of an error: names (for ``op:``, operators) of layers like those the pattern may have meant."""
    if not layers:
        return "the model has no layer that can be quantized"
    if pattern.op is not None:
        return f"the operators are {', '.join(sorted({layer.op for layer in layers}))}"
    # The words of a name count like the whole, or a short pattern would be unlike every long name.
    nodes: dict[str, str] = {}
    for layer in layers:
        for part in (layer.node, layer.original, layer.module, *re.split(r"[/.]", layer.node)):
            if part:
                nodes.setdefault(part, layer.node)
    wanted = re.sub(r"\\.|[^\w./-]", "", pattern.text.removeprefix("re:")).strip("./")
    close = difflib.get_close_matches(wanted, nodes, n=3, cutoff=0.6)
    near = list(dict.fromkeys(nodes[part] for part in close))
    names = near or [layer.node for layer in layers[:3]]
    return f"{'nearest' if near else 'layers are named like'}: {', '.join(map(repr, names))}"
