"""Edit distances against the textbook's loop, and the warped path against every path there is."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.ops import edit_distance
from potstill.ops.edit_distance import (
    bytes_to_columns,
    dtw_path,
    edit_distance_table,
    edit_distances,
    find_single_matches,
)

law = settings(max_examples=60, derandomize=True)
strings = st.binary(max_size=7).map(lambda text: bytes(byte % 3 + 97 for byte in text))
grids = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 3), min_size=width, max_size=width), min_size=1, max_size=4)
)


def by_definition(a: bytes, b: bytes) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def paths(i: int, j: int) -> Iterator[list[list[int]]]:
    """Every way from (0, 0) to (i, j), those that step back on both sides at the end first, then the first side."""
    if i == j == 0:
        yield [[0, 0]]
        return
    for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)):
        if a >= 0 and b >= 0:
            yield from ([*path, [i, j]] for path in paths(a, b))


def cost(path: list[list[int]], costs: Tensor) -> int:
    return sum(int(costs[i, j]) for i, j in path)


def test_a_kitten_is_three_edits_from_sitting() -> None:
    assert edit_distance_table([b"kitten", b"ab", b""], [b"sitting", b"ab"]).tolist() == [[3, 6], [7, 0], [7, 2]]


@given(st.lists(strings, max_size=6), st.lists(strings, max_size=6))
@law
def test_distances_are_the_textbooks(first: list[bytes], second: list[bytes]) -> None:
    found = edit_distance_table(first, second)
    assert found.tolist() == [[by_definition(a, b) for b in second] for a in first]
    assert torch.equal(found, edit_distance_table(second, first).T)


def test_strings_compared_a_few_at_a_time_are_as_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = [b"the", b" quick", b"brown", b"", b"the"], [b"th", b"equick", b"own"]
    expected = edit_distance_table(first, second)
    monkeypatch.setattr(edit_distance, "BLOCK", 2)
    assert torch.equal(edit_distance_table(first, second), expected)


def test_strings_end_where_minus_one_begins() -> None:
    padded = torch.nn.functional.pad(bytes_to_columns([b"abc"]), (0, 0, 0, 3), value=-1)
    assert (
        edit_distances(padded, bytes_to_columns([b"ac"])).tolist()
        == edit_distances(bytes_to_columns([b"ac"]), padded).tolist()
        == [1]
    )


@given(grids)
@law
def test_the_path_is_the_cheapest_and_the_first_of_them_read_from_its_end(grid: list[list[int]]) -> None:
    costs = torch.tensor(grid)
    best: dict[tuple[int, int], int] = {}
    for i in range(costs.shape[0]):
        for j in range(costs.shape[1]):
            best[i, j] = min(cost(path, costs) for path in paths(i, j))
    i, j, expected = costs.shape[0] - 1, costs.shape[1] - 1, []
    while True:
        expected.append([i, j])
        steps = [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if (a, b) in best]
        if not steps:
            break
        i, j = min(
            steps, key=lambda step: best[step]
        )  # the first of equals: both, then the first side, then the second
    assert dtw_path(costs).tolist() == expected[::-1]
    assert cost(dtw_path(costs).tolist(), costs) == best[costs.shape[0] - 1, costs.shape[1] - 1]


def test_equal_paths_step_back_on_both_sides_then_on_the_first_then_on_the_second() -> None:
    assert dtw_path(torch.zeros(3, 3, dtype=torch.int64)).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert dtw_path(torch.zeros(3, 2, dtype=torch.int64)).tolist() == [[0, 0], [1, 0], [2, 1]]
    up_or_left = torch.tensor([[0, 1], [1, 9]])
    assert dtw_path(up_or_left).tolist() == [[0, 0], [1, 1]]
    assert dtw_path(torch.tensor([[0, 0, 9], [0, 9, 0], [9, 0, 0]])).tolist() == [[0, 0], [0, 1], [1, 2], [2, 2]]


def test_a_token_has_one_partner_or_several() -> None:
    teacher, student = [b"ab", b"c", b"d"], [b"a", b"b", b"c", b"d"]
    path = dtw_path(edit_distance_table(teacher, student))
    assert path.tolist() == [[0, 0], [0, 1], [1, 2], [2, 3]]
    assert find_single_matches(path, len(student)).tolist() == [0, 0, 1, 2]
    assert find_single_matches(path.flip(-1), len(teacher)).tolist() == [-1, 2, 3]


def test_nothing_is_paired_with_nothing() -> None:
    assert dtw_path(edit_distance_table([], [b"a"])).shape == (0, 2)
    assert find_single_matches(dtw_path(edit_distance_table([], [b"a"])), 1).tolist() == [-1]
