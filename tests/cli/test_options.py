"""Counts as people write them."""

import pytest

from potstill.cli.options import parse_count
from potstill.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "number"),
    [("200", 200), ("200k", 200_000), ("60M", 60_000_000), ("1.5G", 1_500_000_000), ("1_000", 1000), ("7b", 7 * 10**9)],
)
def test_a_count_has_a_unit(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "0", "-3", "k", "2T", "1e3", "two", "1.2.3", "0.0004k"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(UsageError, match="is no count"):
        parse_count(text)


def test_a_number_is_a_count_already() -> None:
    assert (parse_count(5), parse_count(None)) == (5, None)
