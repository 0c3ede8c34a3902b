"""Preferences as messages and as batches."""

import pytest

from potstill.core.errors import UsageError
from potstill.core.types import CHOSEN, REJECTED, supervised_positions
from potstill.data.preferences import batch_of


def test_a_batch_of_pairs_holds_each_prompt_once_and_both_answers_after_it() -> None:
    batch = batch_of([([1, 2, 3], [4, 5], [4, 6, 7]), ([8, 9], [10], [11])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 3, 4, 6, 7, 8, 9, 10, 9, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 2, 1, 2]]
    assert batch["sides"].tolist() == [-1, CHOSEN, REJECTED, -1, CHOSEN, REJECTED]
    assert batch["groups"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["pairs"].tolist() == [[1, 4], [2, 5]]
    assert supervised_positions(batch)[1].tolist() == [4, 5, 4, 6, 7, 10, 11]


def test_a_batch_without_shared_prompts_repeats_them() -> None:
    batch = batch_of([([1, 2, 3], [4, 5], [6])], shared=False)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch["sides"].tolist() == [CHOSEN, REJECTED]
    assert batch["pairs"].tolist() == [[0], [1]]
    assert supervised_positions(batch)[1].tolist() == [4, 5, 6]


def test_a_prompt_of_one_token_is_repeated() -> None:
    batch = batch_of([([1], [4, 5], [6])])
    assert batch["input_ids"].tolist() == [[1, 4, 5, 1, 6]]
    assert batch["offsets"].tolist() == [0, 0]
    assert supervised_positions(batch)[1].tolist() == [4, 5, 6]


@pytest.mark.parametrize("pairs", [[], [([], [1], [2])], [([1], [], [2])], [([1], [2], [])]])
def test_a_pair_without_tokens_is_refused(pairs: list[tuple[list[int], list[int], list[int]]]) -> None:
    with pytest.raises(UsageError, match="at least one"):
        batch_of(pairs)
