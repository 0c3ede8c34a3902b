"""Counts as people read them."""

import pytest

from potstill.core.counts import count_noun


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 documents"), (1, "1 document"), (2, "2 documents"), (1200, "1,200 documents")]
)
def test_one_is_singular(number: int, text: str) -> None:
    assert count_noun(number, "document") == text
