"""Padding packed documents moves them and changes nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.core.types import IGNORE, supervised_positions
from potstill.ops import layout
from potstill.ops.layout import apply_padded, pad_to_multiple, repeat_prompts, unpack

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def packed(lengths: list[int], *, seed: int = 0) -> dict[str, Tensor]:
    """One packed row of documents of these lengths, with random tokens of which about half are trained on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 100, (1, sum(lengths)), generator=generator)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    kept = (torch.rand(ids.shape, generator=generator) < 0.5) & (position_ids > 0)
    return {
        "input_ids": ids,
        "labels": torch.where(kept, ids, IGNORE),
        "position_ids": position_ids,
        "documents": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None],
    }


def test_two_documents_come_out_as_written_by_hand() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "labels": torch.tensor([[IGNORE, 6, IGNORE, 8, IGNORE]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
        "documents": torch.tensor([[0, 0, 1, 1, 1]]),
    }
    padded = unpack(batch)
    assert padded["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert padded["labels"].tolist() == [[IGNORE, 6, IGNORE], [IGNORE, 8, IGNORE]]
    assert padded["position_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert padded["documents"].tolist() == [[0, 0, -1], [1, 1, 1]]


@given(LENGTHS)
def test_what_is_supervised_comes_in_the_same_order(lengths: list[int]) -> None:
    batch = packed(lengths)
    (before, targets, segment), (after, padded_targets, padded_segment) = (
        supervised_positions(batch),
        supervised_positions(unpack(batch)),
    )
    assert torch.equal(padded_targets, targets)
    assert torch.equal(padded_segment, segment)
    assert torch.equal(unpack(batch)["input_ids"][after], batch["input_ids"][before])


@given(LENGTHS)
def test_every_token_keeps_its_document_and_its_position(lengths: list[int]) -> None:
    batch, padded = packed(lengths), unpack(packed(lengths))
    real = padded["documents"] >= 0
    assert padded["input_ids"].shape == (len(lengths), max(lengths))
    assert real.sum(1).tolist() == lengths
    for name, value in batch.items():
        assert torch.equal(padded[name][real], value.flatten())


@given(LENGTHS)
def test_padding_twice_is_padding_once(lengths: list[int]) -> None:
    once = unpack(packed(lengths))
    twice = unpack(once)
    assert all(torch.equal(twice[name], once[name]) for name in once)


@given(LENGTHS, LENGTHS)
@settings(max_examples=30)
def test_several_packs_of_one_batch_lie_one_after_the_other(above: list[int], below: list[int]) -> None:
    width = max(sum(above), sum(below))
    rows = [packed(above), packed(below, seed=1)]
    rows[1]["documents"] = rows[1]["documents"] + len(above)
    fills = {"input_ids": 0, "labels": IGNORE, "position_ids": 0, "documents": -1}
    both = {
        name: torch.cat([torch.nn.functional.pad(r[name], (0, width - r[name].shape[1]), value=v) for r in rows])
        for name, v in fills.items()
    }
    padded = unpack(both)
    assert (padded["documents"] >= 0).sum(1).tolist() == [*above, *below]
    assert torch.equal(supervised_positions(padded)[1], torch.cat([supervised_positions(row)[1] for row in rows]))


def test_padding_on_the_left_goes_to_the_right() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6]]),
        "position_ids": torch.tensor([[0, 0, 0, 1]]),
        "documents": torch.tensor([[-1, -1, 0, 0]]),
    }
    assert unpack(batch)["input_ids"].tolist() == [[5, 6]]


def test_a_document_cut_at_its_left_keeps_its_positions() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "position_ids": torch.tensor([[3, 4, 0]]),
        "documents": torch.tensor([[0, 0, 1]]),
    }
    padded = unpack(batch)
    assert padded["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert padded["position_ids"].tolist() == [[3, 4], [0, 0]]


def test_two_documents_cut_at_their_left_are_told_apart_by_their_numbers() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "position_ids": torch.tensor([[3, 4, 9]]),
        "documents": torch.tensor([[0, 0, 1]]),
    }
    assert unpack(batch)["input_ids"].tolist() == [[5, 6], [7, 0]]


def test_a_mask_of_positions_moves_along_and_other_shapes_are_passed_on() -> None:
    batch = packed([2, 3])
    asked = torch.tensor([[True, False, True, True, False]])
    rewards = torch.tensor([0.5, 0.25])
    padded = unpack({**batch, "asked": asked, "rewards": rewards})
    assert padded["asked"].dtype == torch.bool
    assert padded["asked"].tolist() == [[True, False, False], [True, True, False]]
    assert padded["rewards"] is rewards


def test_hidden_states_are_laid_out_like_their_tokens_and_gradients_come_back() -> None:
    batch = packed([2, 3])
    states = torch.randn(1, 5, 4, requires_grad=True)
    cells = layout.compute_cells(batch["position_ids"], batch["documents"])
    laid = layout.gather_cells(states, cells)
    assert torch.equal(laid[batch["position_ids"].new_tensor([0, 0, 1, 1, 1]), batch["position_ids"][0]], states[0])
    laid.sum().backward()
    assert torch.equal(states.grad, torch.ones_like(states))  # type: ignore[arg-type]


def test_the_batch_that_came_in_is_left_as_it_was() -> None:
    batch = packed([3, 1, 2])
    before = {name: value.clone() for name, value in batch.items()}
    unpack(batch)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_padding_is_what_the_shared_types_say() -> None:
    assert {"labels": IGNORE, "documents": -1}.items() <= layout.PADDING.items()


@pytest.mark.parametrize("width", [0, 3])
def test_a_batch_of_nothing_but_padding_has_no_rows(width: int) -> None:
    nothing = torch.zeros(1, width, dtype=torch.long)
    padded = unpack({"input_ids": nothing, "position_ids": nothing, "documents": nothing - 1})
    assert len(padded["input_ids"]) == 0


@pytest.mark.parametrize(("size", "even"), [(0, 0), (1, 1), (31, 31), (32, 32), (33, 64), (64, 64), (65, 96)])
@pytest.mark.parametrize("dim", [0, 1])
def test_more_than_32_rows_are_filled_up_with_zeros_to_a_multiple_of_32(size: int, even: int, dim: int) -> None:
    x = torch.randn(size, size)
    found = pad_to_multiple(x, dim)
    assert torch.equal(found.narrow(dim, 0, size), x)
    assert found.shape[dim] == even
    assert found.shape[1 - dim] == size
    assert not found.narrow(dim, size, even - size).any()


def test_zeros_keep_the_dtype_and_a_gradient_passes_by_them() -> None:
    assert pad_to_multiple(torch.ones(1, 33, dtype=torch.bool), dim=1).sum() == 33
    x = torch.randn(33, 2, dtype=torch.bfloat16, requires_grad=True)
    pad_to_multiple(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("size", [1, 32, 33])
def test_rows_that_are_filled_up_to_be_multiplied_come_back_without_the_filling(size: int) -> None:
    rows, seen = torch.randn(size, 3, dtype=torch.float64), []

    def linear(x: Tensor) -> Tensor:
        seen.append(len(x))
        return 2 * x + 1

    assert torch.equal(apply_padded(linear, rows), 2 * rows + 1)
    assert seen == [len(pad_to_multiple(rows))]


SHARED = {  # a prompt of two tokens with two continuations, a text, and a prompt whose continuation begins within it
    "input_ids": torch.tensor([[1, 2, 3, 4, 5, 3, 6, 7, 8, 10, 11, 12, 11, 13]]),
    "labels": torch.tensor([[IGNORE, IGNORE, IGNORE, 4, 5, 3, 6, IGNORE, 8, IGNORE, IGNORE, 12, IGNORE, 13]]),
    "position_ids": torch.tensor([[0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 1, 2, 1, 2]]),
    "documents": torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5]]),
    "sampled": torch.tensor([[False] * 2 + [True] * 3 + [False] * 9]),
    "offsets": torch.tensor([0, 2, 2, 0, 0, 1]),
    "pairs": torch.tensor([[1], [2]]),
}


def test_every_continuation_repeats_its_prompt_as_written_by_hand() -> None:
    whole = repeat_prompts(SHARED)
    assert whole["input_ids"].tolist() == [[1, 2, 1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 10, 11, 12, 10, 11, 13]]
    assert whole["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2]]
    assert whole["documents"].tolist() == [[0] * 2 + [1] * 5 + [2] * 4 + [3] * 2 + [4] * 3 + [5] * 3]
    x = IGNORE
    assert whole["labels"].tolist() == [[x, x, x, x, x, 4, 5, x, x, x, 6, x, 8, x, x, 12, x, x, 13]]
    assert whole["sampled"].tolist() == [[False] * 2 + [True] * 5 + [False] * 12]
    assert whole["offsets"].tolist() == [0] * 6
    assert whole["pairs"] is SHARED["pairs"]


def test_repeated_prompts_leave_what_is_supervised_as_it_was() -> None:
    (before, targets, documents), (after, repeated_targets, repeated_documents) = (
        supervised_positions(SHARED),
        supervised_positions(repeat_prompts(SHARED)),
    )
    assert torch.equal(repeated_targets, targets)
    assert torch.equal(repeated_documents, documents)
    assert torch.equal(repeat_prompts(SHARED)["input_ids"][after], SHARED["input_ids"][before])


def test_padded_rows_hold_each_continuation_with_its_prompt() -> None:
    padded, again = unpack(SHARED), unpack(repeat_prompts(SHARED))
    assert padded["input_ids"].tolist()[1:3] == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]]
    for name in padded:
        assert torch.equal(padded[name], again[name])
        assert torch.equal(padded[name], unpack(padded)[name])


def test_a_batch_without_continuations_is_not_laid_out_anew() -> None:
    batch = packed([3, 1, 4])
    assert repeat_prompts(batch) is batch
    late = {**batch, "position_ids": batch["position_ids"] + 2}  # no document begins at 0
    assert repeat_prompts(late) is late
