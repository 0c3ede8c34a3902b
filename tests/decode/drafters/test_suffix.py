"""The longest suffix that occurs earlier, here or in past answers, votes on the draft."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.decode.drafters.drafter import Draft, DraftContext
from potstill.decode.drafters.suffix import Place, SuffixDrafter, SuffixIndex
from potstill.decode.sampling import Sampling

SAMPLING = Sampling(vocabulary=10, stop=frozenset())


def propose(drafter: SuffixDrafter, ids: list[int], *, limit: int = 10, depth: int = 10, slot: int = 0) -> Draft:
    return drafter.propose(DraftContext(slot=slot, ids=ids, limit=limit, depth=depth, sampling=SAMPLING))


def search(ids: list[int]) -> tuple[int, set[int]]:
    """The definition: the length of the longest suffix that occurs before, and where its occurrences end."""
    for n in range(len(ids) - 1, 0, -1):
        ends = {start + n for start in range(len(ids) - n) if ids[start : start + n] == ids[-n:]}
        if ends:
            return n, ends
    return 0, set()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 4))
def test_the_index_finds_all_occurrences_of_the_longest_suffix(ids: list[int], step: int) -> None:
    index = SuffixIndex()
    for end in range(1, len(ids) + 1, step):
        index.extend(0, ids[:end])
        length, places = index.find_longest(ids[:end])
        assert (length, {place.position for place in places}) == search(ids[:end])


def test_a_chain_takes_the_most_frequent_continuation() -> None:
    ids = [1, 2, 3, 4, 1, 2, 5, 6, 1, 2, 5, 7, 1, 2]
    drafter = SuffixDrafter()
    drafter.start(0, ids)
    # of the three continuations 3 4, 5 6 and 5 7, two begin with 5; of those the later one comes first
    assert list(propose(drafter, ids, depth=2).tokens) == [5, 7]


def test_a_tree_takes_the_nodes_with_the_best_scores() -> None:
    ids = [1, 2, 3, 4, 1, 2, 5, 6, 1, 2, 5, 7, 1, 2]
    drafter = SuffixDrafter(tree=True)
    drafter.start(0, ids)
    draft = propose(drafter, ids, limit=4, depth=2)
    paths = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    # scores: 5 has 2/3, its children 7 and 6 half of that, as much as 3 at the root
    assert paths == [[5], [3], [5, 7], [5, 6]]


def test_a_short_match_gives_a_short_draft() -> None:
    ids = [8, 1, 2, 3, 4, 5, 6, 7, 9, 1]
    drafter = SuffixDrafter()
    drafter.start(0, ids)
    assert list(propose(drafter, ids).tokens) == [2, 3, 4, 5]


@pytest.mark.parametrize("past_tokens", [0, 100])
def test_past_answers_are_looked_up_as_long_as_there_is_room(past_tokens: int) -> None:
    drafter = SuffixDrafter(past_tokens=past_tokens)
    drafter.start(0, [1, 2])
    propose(drafter, [1, 2, 3, 4, 5])
    drafter.free(0)
    drafter.start(0, [9, 2, 3])
    assert list(propose(drafter, [9, 2, 3]).tokens) == ([4, 5] if past_tokens else [])


def test_a_text_that_is_removed_leaves_nothing() -> None:
    index = SuffixIndex()
    index.extend(0, [1, 2, 3])
    index.extend(1, [1, 2])
    index.remove(0)
    assert index.find_longest([2, 1]) == (1, [Place(1, 1)])
    index.remove(1)
    assert (index.num_tokens, dict(index.places)) == (0, {})
