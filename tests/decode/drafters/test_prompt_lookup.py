"""What followed the earliest occurrence of the last tokens is the draft."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.decode.drafters.drafter import DraftContext
from potstill.decode.drafters.prompt_lookup import PromptLookup
from potstill.decode.sampling import Sampling

SAMPLING = Sampling(vocabulary=10, stop=frozenset())


def propose(drafter: PromptLookup, ids: list[int], limit: int = 10) -> list[int]:
    context = DraftContext(slot=0, ids=ids, limit=limit, depth=limit, sampling=SAMPLING)
    return list(drafter.propose(context).tokens)


def search(ids: list[int], limit: int) -> list[int]:
    """The definition: the longest suffix of at most 3 tokens that occurs earlier, at its earliest occurrence."""
    for n in (3, 2, 1):
        for start in range(len(ids) - n):
            if n < len(ids) and ids[start : start + n] == ids[-n:]:
                return ids[start + n : start + n + limit]
    return []


@pytest.mark.parametrize(
    ("ids", "draft"),
    [
        pytest.param([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], [4, 9, 2, 3, 5], id="three tokens before two"),
        pytest.param([2, 3, 4, 9, 2, 3, 5, 7, 2, 3], [4, 9, 2, 3, 5], id="the earliest of two"),
        pytest.param([5, 6, 5], [6, 5], id="a continuation shorter than the limit"),
        pytest.param([7, 7], [7], id="a token that repeats"),
        pytest.param([1, 2, 3], [], id="a new token"),
        pytest.param([1], [], id="one token"),
    ],
)
def test_the_draft_is_the_continuation_of_the_earliest_longest_match(ids: list[int], draft: list[int]) -> None:
    drafter = PromptLookup()
    drafter.start(0, ids)
    assert propose(drafter, ids, limit=5) == draft


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 5))
def test_an_index_that_grows_with_the_text_finds_what_a_search_finds(ids: list[int], limit: int, step: int) -> None:
    drafter = PromptLookup()
    drafter.start(0, ids[:1])
    for end in range(1, len(ids) + 1, step):
        assert propose(drafter, ids[:end], limit) == search(ids[:end], limit)


def test_a_new_text_in_the_slot_has_an_index_of_its_own() -> None:
    drafter = PromptLookup()
    drafter.start(0, [1, 2, 1])
    assert propose(drafter, [1, 2, 1]) == [2, 1]
    drafter.free(0)
    drafter.start(0, [1])
    assert propose(drafter, [1]) == []
