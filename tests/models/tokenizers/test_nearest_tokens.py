"""The nearest token of another vocabulary, against a comparison of all with all."""

import random

import pytest

from potstill.models.tokenizers import nearest_tokens as module
from potstill.models.tokenizers.nearest_tokens import find_nearest_tokens
from potstill.models.tokenizers.token_bytes import TokenBytes
from potstill.ops.edit_distance import edit_distance_table


def vocabulary(seed: int, size: int) -> TokenBytes:
    """Random strings over three letters; id 0 is special, id 1 a single byte of a fallback."""
    draw = random.Random(seed)
    of = ["".join(draw.choices("abc", k=draw.randint(1, 5))).encode() for _ in range(size)]
    return TokenBytes(of, frozenset({0}), frozenset({0}), frozenset({1}))


def by_definition(first: TokenBytes, second: TokenBytes, within: int) -> list[int]:
    apart = edit_distance_table(first.by_id, second.by_id).tolist()
    found = []
    for i in range(len(first.by_id)):
        reach = [
            (apart[i][j], j in second.byte_fallback_ids, j)
            for j in range(1, len(second.by_id))
            if apart[i][j] <= within
        ]
        strings = [one for one in reach if (not one[1] and i not in first.byte_fallback_ids) or one[0] == 0]
        found.append(min(strings)[2] if strings and i not in first.special_ids else -1)
    return found


@pytest.mark.parametrize("within", [0, 1, 2])
def test_it_is_the_nearest_of_all_with_the_lowest_id(within: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = vocabulary(0, 60), vocabulary(1, 25)
    assert find_nearest_tokens(first, second, max_distance=within).tolist() == by_definition(first, second, within)
    monkeypatch.setattr(module, "CHUNK_SIZE", 7)
    assert find_nearest_tokens(first, second, max_distance=within).tolist() == by_definition(first, second, within)


def test_a_string_written_otherwise_is_found_and_a_far_one_is_not() -> None:
    none: frozenset[int] = frozenset()
    first = TokenBytes([b" Dog", b"dogs", b"elephant", b""], none, none, none)
    second = TokenBytes([b"dot", b"dog", b" dog"], none, none, none)
    assert find_nearest_tokens(first, second).tolist() == [2, 1, -1, -1]
