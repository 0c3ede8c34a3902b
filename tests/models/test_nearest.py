"""The nearest token of another vocabulary, against a comparison of all with all."""

import random

import pytest

from potstill.models import nearest as module
from potstill.models.nearest import nearest
from potstill.models.pieces import Pieces
from potstill.ops.edit import table


def vocabulary(seed: int, size: int) -> Pieces:
    """Random strings over three letters; id 0 is special, id 1 a single byte of a fallback."""
    draw = random.Random(seed)
    of = ["".join(draw.choices("abc", k=draw.randint(1, 5))).encode() for _ in range(size)]
    return Pieces(of, frozenset({0}), frozenset({0}), frozenset({1}))


def by_definition(first: Pieces, second: Pieces, within: int) -> list[int]:
    apart = table(first.of, second.of).tolist()
    found = []
    for i in range(len(first.of)):
        reach = [(apart[i][j], j in second.raw, j) for j in range(1, len(second.of)) if apart[i][j] <= within]
        strings = [one for one in reach if (not one[1] and i not in first.raw) or one[0] == 0]
        found.append(min(strings)[2] if strings and i not in first.special else -1)
    return found


@pytest.mark.parametrize("within", [0, 1, 2])
def test_it_is_the_nearest_of_all_with_the_lowest_id(within: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = vocabulary(0, 60), vocabulary(1, 25)
    assert nearest(first, second, within=within).tolist() == by_definition(first, second, within)
    monkeypatch.setattr(module, "AT_ONCE", 7)
    assert nearest(first, second, within=within).tolist() == by_definition(first, second, within)


def test_a_string_written_otherwise_is_found_and_a_far_one_is_not() -> None:
    none: frozenset[int] = frozenset()
    first = Pieces([b" Dog", b"dogs", b"elephant", b""], none, none, none)
    second = Pieces([b"dot", b"dog", b" dog"], none, none, none)
    assert nearest(first, second).tolist() == [2, 1, -1, -1]
