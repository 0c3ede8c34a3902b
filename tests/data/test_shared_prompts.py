"""Answers that share a prompt, and the pairs among them."""

import pytest
import torch

from potstill.core.errors import DataError
from potstill.core.types import BASELINE, CHOSEN, IGNORE, REJECTED, Needs, select_routed_documents, supervised_positions
from potstill.data.packing import collate, pack
from potstill.data.token_dataset import TokenDataset, TokenizedDocument


def pair(number: int, prompt: list[int], *answers: list[int], sides: tuple[int, ...]) -> list[TokenizedDocument]:
    """The documents of a prompt and its answers: the prompt without its last token, then a continuation each."""
    shared = [TokenizedDocument(prompt[:-1], [IGNORE] * (len(prompt) - 1), {"groups": number})]
    return (shared if prompt[:-1] else []) + [
        TokenizedDocument(
            [prompt[-1], *answer],
            [IGNORE, *answer],
            {"groups": number, "sides": side, "offsets": len(prompt) - 1},
        )
        for answer, side in zip(answers, sides, strict=True)
    ]


FIRST = pair(0, [1, 2, 3], [4, 5], [6], sides=(CHOSEN, REJECTED))
SECOND = pair(1, [7, 8], [9], [10, 11], sides=(REJECTED, CHOSEN))


def test_positions_of_a_continuation_go_on_from_its_prompt() -> None:
    batch = collate([pack(FIRST, length=8)[0], pack(SECOND, length=8)[0]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 3, 6, 7, 8, 9, 8, 10, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 1, 2, 3]]
    assert batch["documents"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 5, 5, 5]]
    assert batch["offsets"].tolist() == [0, 2, 2, 0, 1, 1]
    assert batch["sides"].tolist() == [-1, CHOSEN, REJECTED, -1, REJECTED, CHOSEN]
    assert batch["groups"].tolist() == [0, 0, 0, 1, 1, 1]


def test_pairs_number_the_chosen_and_the_rejected_document_of_each_group() -> None:
    batch = collate([pack(FIRST, length=8)[0], pack(SECOND, length=8)[0]])
    assert batch["pairs"].tolist() == [[1, 5], [2, 4]]


def test_a_group_without_both_sides_gives_no_pair() -> None:
    rows = pair(0, [1, 2], [3], [4], sides=(CHOSEN, BASELINE)) + pair(1, [5, 6], [7], sides=(REJECTED,))
    assert collate([pack(rows, length=16)[0]])["pairs"].tolist() == [[], []]
    assert "pairs" not in collate([pack([TokenizedDocument([1, 2], [1, 2])], length=4)[0]])


def test_answers_with_baselines_are_no_pairs_though_several_are_in_a_group() -> None:
    rows = pair(0, [1, 2], [3], [4], sides=(CHOSEN, BASELINE)) + pair(0, [5, 6], [7], [8], sides=(REJECTED, BASELINE))
    rows += pair(0, [9, 2], [3], [4], sides=(CHOSEN, BASELINE))
    assert collate([pack(rows, length=32)[0]])["pairs"].tolist() == [[], []]


def test_every_answer_token_is_predicted_once_and_no_prompt_token_is() -> None:
    batch = collate([pack(FIRST + SECOND, length=16)[0]])
    assert sorted(supervised_positions(batch)[1].tolist()) == [4, 5, 6, 9, 10, 11]


def test_a_prompt_of_one_token_has_nothing_to_share() -> None:
    batch = collate([pack(pair(0, [1], [2, 3], [4], sides=(CHOSEN, REJECTED)), length=8)[0]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["pairs"].tolist() == [[0], [1]]


def test_a_saved_data_set_of_pairs_packs_alike() -> None:
    packs = [pack(rows, length=8) for rows in (FIRST + SECOND, TokenDataset(enumerate(FIRST + SECOND)))]
    assert packs[0].digest == packs[1].digest


def test_two_pairs_in_one_group_are_refused() -> None:
    rows = pair(0, [1, 2], [3], [4], [5], sides=(CHOSEN, REJECTED, REJECTED))
    with pytest.raises(DataError, match="a group has several chosen or rejected documents; give each pair a group"):
        collate([pack(rows, length=16)[0]])


@pytest.mark.parametrize(
    ("lengths", "offsets", "message"),
    [
        ([3, 2], [0, 4], "a document begins at position 4, and the prompt before it has 3 tokens"),
        ([2], [1], "a document begins at position 1, and the prompt before it has 0 tokens"),
        ([3, 2, 2], [0, 1, 3], "a continuation begins at position 3, where the one before it ends"),
    ],
)
def test_a_continuation_whose_prompt_cannot_be_found_is_refused(
    lengths: list[int], offsets: list[int], message: str
) -> None:
    tokens = torch.arange(sum(lengths))
    broken = {"input_ids": tokens, "labels": tokens, "lengths": torch.tensor(lengths), "offsets": torch.tensor(offsets)}
    with pytest.raises(DataError, match=message):
        collate([broken])


def test_a_routed_answer_comes_with_its_prompt() -> None:
    rows = [row._replace(fields={**row.fields, "routes": number}) for number, row in enumerate(FIRST + SECOND)]
    batch = collate([pack(rows, length=16)[0]])
    needs = Needs(supervised_positions(batch)[0] & (batch["routes"] == 2))
    selected, selected_needs = select_routed_documents(batch, needs)
    assert selected["input_ids"].tolist() == [[1, 2, 3, 6]]
    assert selected["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert selected_needs.positions is not None
    assert selected_needs.positions.tolist() == [[False, False, True, False]]
    everything, _ = select_routed_documents(batch, Needs(supervised_positions(batch)[0]))
    assert torch.equal(everything["input_ids"], batch["input_ids"])
