"""The text corpora inside the gensim wheel: news articles, and human judgements of their similarity."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from .cache import package

_GENSIM = "gensim==4.4.0"


def data_file(name: str) -> Path:
    """A file of gensim's test data."""
    return package(_GENSIM, compiled=True) / "gensim" / "test" / "test_data" / name


def documents(name: str) -> list[str]:
    """The documents of `lee.cor` (50) or `lee_background.cor` (300), one a line."""
    return data_file(name).read_text(encoding="latin-1").strip().split("\n")


@cache
def words() -> tuple[str, ...]:
    """Words of the background corpus in running order, frequent ones often, as rendering wants them."""
    return tuple(re.findall(r"[A-Za-z][A-Za-z\-']{1,12}", " ".join(documents("lee_background.cor"))))
