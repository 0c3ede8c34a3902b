"""Counts as people write them: `200k`, `60M`."""

import re

from potstill.core.errors import UsageError

COUNT_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgb]?)", re.IGNORECASE)
UNIT_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def parse_count(text: str | int | None) -> int | None:
    """`60M`, `200k` or `1.5G` as a number.

    Raises: UsageError for any other text.
    """
    if text is None:
        return text
    match = COUNT_PATTERN.fullmatch(str(text).strip().replace("_", "").replace(",", ""))
    number = 0 if match is None else round(float(match[1]) * UNIT_FACTORS[match[2].lower()])
    if number < 1:
        raise UsageError(f"{text!r} is not a count; write 200000, 200k or 60M")
    return number


def count_noun(number: int, noun: str) -> str:
    """`1 document` or `1,200 documents`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_count(number: int | None) -> str | None:
    """A count in its largest whole unit: `200k`, `2M`."""
    if number is None:
        return None
    factor, unit = max((factor, unit) for unit, factor in UNIT_FACTORS.items() if number % factor == 0)
    return f"{number // factor}{unit if unit == 'k' else unit.upper()}"
