"""The types that flow everywhere."""

import torch

from potstill.core.measure import Measure
from potstill.core.types import (
    IGNORE,
    Head,
    Needs,
    Signals,
    get_view,
    gold_mask,
    move_batch,
    next_token_positions,
    select_needed_rows,
    supervised_positions,
)


def test_a_position_is_supervised_if_its_next_token_is_trained_and_of_the_same_document() -> None:
    batch = {
        "labels": torch.tensor([[IGNORE, 11, 12, IGNORE, 21, IGNORE, IGNORE, 32, IGNORE]]),
        "documents": torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1]]),
    }
    positions, targets, segment = supervised_positions(batch)
    assert positions.nonzero()[:, 1].tolist() == [0, 1, 3, 6]
    assert targets.tolist() == [11, 12, 21, 32]
    assert segment.tolist() == [0, 0, 1, 2]


def test_a_batch_moves_as_a_whole() -> None:
    moved = move_batch({"labels": torch.zeros(1, 2), "groups": torch.zeros(1)}, torch.device("meta"))
    assert {name: values.device.type for name, values in moved.items()} == {"labels": "meta", "groups": "meta"}


def test_the_first_token_of_a_document_is_never_a_target_even_if_it_is_labelled() -> None:
    batch = {"labels": torch.tensor([[1, 2, 3, 4]]), "documents": torch.tensor([[0, 0, 1, 1]])}
    assert supervised_positions(batch)[1].tolist() == [2, 4]


def test_the_end_of_a_row_predicts_nothing_of_the_next_row() -> None:
    batch = {"labels": torch.tensor([[IGNORE, 5], [6, 7]]), "documents": torch.tensor([[0, 0], [0, 0]])}
    positions, targets, _ = supervised_positions(batch)
    assert positions.tolist() == [[True, False], [True, False]]
    assert targets.tolist() == [5, 7]


def test_needs_unite_and_so_do_their_positions() -> None:
    here, there = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    both = Needs(here, frozenset({1})) | Needs(None, frozenset({2}), extras=frozenset({"router"}))
    assert both.positions is here
    assert (both.layers, both.extras) == (frozenset({1, 2}), frozenset({"router"}))
    assert (Needs() | Needs(here)).positions is here
    united = Needs(here) | Needs(there)
    assert united.positions.tolist() == [[True, True]]
    whole = Signals(torch.tensor([[1.0], [2.0]]), lambda rows: rows, layers={1: torch.tensor([[3.0], [4.0]])})
    assert select_needed_rows(whole, united, united) is whole
    own = select_needed_rows(whole, united, Needs(there))
    assert (own.rows.tolist(), own.layers[1].tolist()) == ([[2.0]], [[4.0]])


def test_targets_are_at_their_position_and_labels_one_further() -> None:
    batch = {"labels": torch.tensor([[1, 2, 3]]), "documents": torch.tensor([[0, 0, 0]])}
    batch["targets"] = torch.tensor([[7, IGNORE, 0]])
    positions, targets, documents = supervised_positions(batch)
    assert (positions.tolist(), targets.tolist(), documents.tolist()) == ([[True, False, True]], [7, 0], [0, 0])
    assert next_token_positions(batch)[1].tolist() == [2, 3]


def test_a_network_without_keys_of_its_own_reads_the_source_too() -> None:
    names = ("input_ids", "source.input_ids", "teacher.input_ids", "teacher.source.input_ids")
    batch = {name: torch.tensor(number) for number, name in enumerate(names)}
    views = [{key: int(values) for key, values in get_view(batch, name).items()} for name in ("student", "teacher")]
    assert views == [{"input_ids": 0, "source.input_ids": 1}, {"input_ids": 2, "source.input_ids": 3}]


def test_a_head_is_its_formula() -> None:
    rows, weight, bias = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    scaled = 0.5 * (rows @ weight.T + bias)
    torch.testing.assert_close(Head(weight, bias, scale=0.5).logits(rows), scaled)
    capped = Head(weight, bias, scale=0.5, softcap=2.0)
    torch.testing.assert_close(capped.logits(rows), 2 * torch.tanh(scaled / 2))
    torch.testing.assert_close(capped.crop_vocabulary(4).logits(rows), capped.logits(rows)[:, :4])
    assert capped.crop_vocabulary(7) is capped
    assert capped.crop_vocabulary(900) is capped


def test_a_measure_leaves_out_what_was_not_measured() -> None:
    assert Measure("loss", 0.0, "nats", 3).to_dict() == {
        "name": "loss",
        "value": 0.0,
        "unit": "nats",
        "n": 3,
        "better": "lower",
    }


def test_a_row_is_gold_unless_its_document_was_sampled() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "labels": ids, "documents": torch.tensor([[0, 0, 1, 1, 1]])}
    assert gold_mask(batch).tolist() == [True, True, True]
    assert gold_mask({**batch, "sampled": batch["documents"] == 1}).tolist() == [True, False, False]
