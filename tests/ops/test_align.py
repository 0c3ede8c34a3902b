"""Two tokenisations of one text, against their definitions by enumeration, and the laws of pairs and groups."""

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.ops.align import Groups, compute_coverage, map_to_shared_text, match_spans, match_starts, merge_spans

law = settings(max_examples=60, derandomize=True)
cuts = st.lists(st.integers(0, 3), max_size=12)  # sizes of tokens; 0 is a token without text


def spans(*sizes: int) -> Tensor:
    """Tokens of these many bytes, end to end."""
    ends = [0, *accumulate(sizes)]
    return torch.tensor(list(pairwise(ends)), dtype=torch.int64).view(-1, 2)


def of(*tokens: str) -> Tensor:
    return spans(*(len(token) for token in tokens))


@st.composite
def gappy(draw: st.DrawFn) -> Tensor:
    """Tokens with stretches of text between them that none stands for."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12))
    laid = spans(*(size for size, _ in sizes))
    return laid[torch.tensor([kept for _, kept in sizes], dtype=torch.bool)]


def by_definition(first: Tensor, second: Tensor, *, ends: bool) -> list[list[int]]:
    return [
        [i, j]
        for i, (a, b) in enumerate(first.tolist())
        for j, (c, d) in enumerate(second.tolist())
        if a < b and c < d and a == c and (b == d or not ends)
    ]


def bytes_of(spans: Tensor) -> list[int]:
    return [byte for start, end in spans.tolist() for byte in range(start, end)]


def members(groups: Groups) -> list[tuple[list[int], list[int]]]:
    return [
        tuple(torch.nonzero(side == g)[:, 0].tolist() for side in (groups.first, groups.second))  # type: ignore[misc]
        for g in range(groups.total)
    ]


def test_the_tokens_behind_a_disagreement_are_paired() -> None:
    teacher, student = of("ab", "c", "d", "E"), of("a", "bc", "d", "E")
    assert match_spans(teacher, student).tolist() == [[2, 2], [3, 3]]
    assert match_starts(teacher, student).tolist() == [[0, 0], [2, 2], [3, 3]]
    assert members(merge_spans(teacher, student)) == [([0, 1], [0, 1]), ([2], [2]), ([3], [3])]


def test_a_token_without_text_has_no_counterpart_and_moves_nothing() -> None:
    with_bos, plain = spans(0, 2, 0, 3, 0), spans(2, 3)
    assert match_spans(with_bos, plain).tolist() == [[1, 0], [3, 1]]
    assert merge_spans(with_bos, plain).first.tolist() == [-1, 0, -1, 1, -1]
    assert match_spans(with_bos, with_bos).tolist() == [[1, 1], [3, 3]]


def test_text_that_one_side_does_not_stand_for_is_in_no_group() -> None:
    whole, gap = spans(2, 1, 2), torch.tensor([[0, 2], [3, 5]])
    assert members(merge_spans(whole, gap)) == [([0], [0]), ([2], [1])]
    across, inside = torch.tensor([[0, 4]]), torch.tensor([[0, 1], [3, 4]])
    assert merge_spans(across, inside).total == 0
    ours, theirs = torch.tensor([[0, 1], [3, 6]]), torch.tensor([[0, 2], [4, 6]])  # as many bytes, and others
    assert merge_spans(ours, theirs).total == 0


@given(gappy(), gappy())
@law
def test_pairs_are_those_of_the_definition(first: Tensor, second: Tensor) -> None:
    assert match_spans(first, second).tolist() == by_definition(first, second, ends=True)
    assert match_starts(first, second).tolist() == by_definition(first, second, ends=False)


@given(gappy(), gappy())
@law
def test_swapping_the_sides_swaps_pairs_and_groups(first: Tensor, second: Tensor) -> None:
    assert match_spans(first, second).tolist() == match_spans(second, first).flip(-1).tolist()
    groups, swapped = merge_spans(first, second), merge_spans(second, first)
    assert [(b, a) for a, b in members(swapped)] == members(groups)


@given(gappy())
@law
def test_a_tokenisation_beside_itself_is_the_identity(one: Tensor) -> None:
    real = torch.nonzero(one[:, 0] < one[:, 1])[:, 0].tolist()
    assert match_spans(one, one).tolist() == [[i, i] for i in real]
    assert members(merge_spans(one, one)) == [([i], [i]) for i in real]


@given(gappy(), gappy())
@law
def test_pairs_ascend_strictly_on_both_sides(first: Tensor, second: Tensor) -> None:
    for pairs in (match_spans(first, second), match_starts(first, second)):
        assert (pairs.diff(dim=0) > 0).all()


@given(gappy(), gappy())
@law
def test_both_sides_of_a_group_stand_for_the_same_bytes_and_no_group_can_be_cut(first: Tensor, second: Tensor) -> None:
    for ours, theirs in members(merge_spans(first, second)):
        covered = bytes_of(first[ours])
        assert covered == bytes_of(second[theirs])
        assert covered == list(range(covered[0], covered[-1] + 1))
        inner = set(first[ours][1:, 0].tolist()) & set(second[theirs][1:, 0].tolist())
        assert not inner


@given(cuts, cuts)
@law
def test_every_token_of_one_text_is_in_a_group_and_exact_pairs_are_the_groups_of_one_token_each(
    ours: list[int], theirs: list[int]
) -> None:
    missing = sum(ours) - sum(theirs)
    first, second = spans(*ours, max(0, -missing)), spans(*theirs, max(0, missing))
    groups = merge_spans(first, second)
    assert ((groups.first >= 0) == (first[:, 0] < first[:, 1])).all()
    assert ((groups.second >= 0) == (second[:, 0] < second[:, 1])).all()
    alone = [[a[0], b[0]] for a, b in members(groups) if len(a) == len(b) == 1]
    assert alone == match_spans(first, second).tolist()


def test_documents_laid_out_at_bytes_of_their_own_are_aligned_as_each_alone() -> None:
    texts = [(of("ab", "c"), of("a", "bc")), (of("d", "e"), of("d", "e"))]
    first, second = (torch.cat([a + 3 * n for n, a in enumerate(side)]) for side in zip(*texts, strict=True))
    assert match_spans(first, second).tolist() == [[2, 2], [3, 3]]
    assert merge_spans(first, second).first.tolist() == [0, 0, 1, 2]


def test_what_two_templates_share_is_aligned_and_stop_strings_stand_for_each_other() -> None:
    student = of("[user]", "Hi", "[stop]", "[bot]", "Yo", "!", "[stop]")
    teacher = of("(BOS)", "<human>", "H", "i", "<end>", "<machine>", "Yo!", "<end>")
    common = torch.tensor([[0, 2], [2, 3], [3, 6], [6, 7]])
    ours = map_to_shared_text(student, torch.tensor([[6, 8], [8, 14], [19, 22], [22, 28]]), common)
    theirs = map_to_shared_text(teacher, torch.tensor([[12, 14], [14, 19], [28, 31], [31, 36]]), common)
    assert match_spans(ours, theirs).tolist() == [[2, 4], [6, 7]]
    assert members(merge_spans(ours, theirs)) == [([1], [2, 3]), ([2], [4]), ([4, 5], [6]), ([6], [7])]


def test_a_token_that_reaches_out_of_what_is_shared_has_no_counterpart() -> None:
    own = torch.tensor([[2, 5], [5, 9]])
    moved = map_to_shared_text(spans(3, 2, 2, 2), own, torch.tensor([[0, 3], [3, 4]]))
    assert moved.tolist() == [[0, 0], [1, 3], [3, 3], [3, 3]]  # the stop string in two tokens is none of them
    assert map_to_shared_text(spans(1, 3), own[:1] - 2, own[:1] - 2).tolist() == [[0, 1], [1, 1]]
    assert map_to_shared_text(spans(3, 2), own[:0], own[:0]).tolist() == [[0, 0], [0, 0]]


@given(cuts)
@law
def test_all_of_a_text_shared_changes_nothing(sizes: list[int]) -> None:
    whole = torch.tensor([[0, max(1, sum(sizes))]])
    assert map_to_shared_text(spans(*sizes), whole, whole).tolist() == spans(*sizes).tolist()


def test_the_share_is_of_the_trained_tokens() -> None:
    trained = torch.tensor([False, True, True, True, True])
    assert compute_coverage(torch.tensor([0, 1, 4]), trained) == 0.5
    assert compute_coverage(torch.tensor([0]), ~trained[:1] & False) == 1.0


def test_nothing_beside_something_has_no_pairs() -> None:
    for first, second in ((spans(), spans(1, 2)), (spans(1, 2), spans()), (spans(), spans())):
        assert match_spans(first, second).shape == (0, 2)
        assert merge_spans(first, second).total == 0


def test_spans_that_overlap_are_ours_to_mend() -> None:
    with pytest.raises(AssertionError, match="overlap"):
        match_spans(torch.tensor([[0, 2], [1, 3]]), spans(3))
