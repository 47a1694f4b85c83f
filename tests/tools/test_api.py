"""docs/api.md is what `python -m tools.api` writes."""

from __future__ import annotations

from tools.api import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run: python -m tools.api"
