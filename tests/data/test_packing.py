"""Packing loses no label, repeats none, and tells documents apart."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from potstill.core.errors import DataError, UsageError
from potstill.core.types import IGNORE, supervised_positions
from potstill.data.packing import Packs, best_fit_decreasing, collate, pack
from potstill.data.token_dataset import TokenizedDocument
from potstill.data.windows import cut_windows
from potstill.ops.layout import unpack


def row(ids: list[int], trained: list[bool] | None = None) -> TokenizedDocument:
    trained = [True] * len(ids) if trained is None else trained
    return TokenizedDocument(
        ids, [i if on and t else IGNORE for t, (i, on) in enumerate(zip(ids, trained, strict=True))]
    )


def distinct(*lengths: int, start: int = 1000) -> list[TokenizedDocument]:
    """Documents of these lengths in which no token comes twice, all trained on."""
    starts = [start + sum(lengths[:i]) for i in range(len(lengths))]
    return [row(list(range(first, first + n))) for first, n in zip(starts, lengths, strict=True)]


@st.composite
def documents(draw: st.DrawFn) -> list[TokenizedDocument]:
    """A few documents, empty ones, untrained ones and long ones among them; at least one label in all."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    rows = [
        row(one.input_ids, draw(st.lists(st.booleans(), min_size=n, max_size=n)))
        for one, n in zip(distinct(*lengths), lengths, strict=True)
    ]
    return [*rows, row([1, 2])]


@given(documents(), st.integers(3, 17), st.booleans())
def test_every_label_is_trained_on_once_and_no_pack_is_too_long(
    rows: list[TokenizedDocument], length: int, bos: bool
) -> None:
    packs = pack(rows, length=length, bos=7 if bos else None)
    wanted = Counter(label for one in rows for label in one.labels if label != IGNORE)
    found: Counter[int] = Counter()
    for i in range(len(packs)):
        one = packs[i]
        assert 0 < len(one["input_ids"]) <= length
        assert len(one["input_ids"]) == one["lengths"].sum()
        found.update(supervised_positions(collate([one]))[1].tolist())
    assert found == wanted
    assert packs.num_trained == wanted.total()


@given(documents(), st.integers(3, 17))
def test_what_a_label_is_predicted_from_is_what_stood_before_it(rows: list[TokenizedDocument], length: int) -> None:
    before = {b: a for one in rows for a, b in zip(one.input_ids, one.input_ids[1:], strict=False)}
    packs = pack(rows, length=length)
    batch = collate([packs[i] for i in range(len(packs))])
    positions, targets, _ = supervised_positions(batch)
    contexts = batch["input_ids"][positions].tolist()
    assert [before[target] for target in targets.tolist()] == contexts


@given(documents(), st.integers(3, 17))
@settings(max_examples=30)
def test_padded_documents_are_supervised_like_the_pack(rows: list[TokenizedDocument], length: int) -> None:
    packs = pack(rows, length=length)
    batch = collate([packs[i] for i in range(len(packs))])
    for ours, theirs in zip(supervised_positions(unpack(batch))[1:], supervised_positions(batch)[1:], strict=True):
        assert torch.equal(ours, theirs)


@given(st.integers(1, 60), st.integers(2, 9))
def test_windows_without_their_overlap_are_the_document(n: int, length: int) -> None:
    (whole,) = distinct(n)
    parts = cut_windows(whole, length=length)
    assert np.concatenate([ids[i > 0 :] for i, (ids, *_) in enumerate(parts)]).tolist() == whole.input_ids
    assert all(part.labels[0] == IGNORE for part in parts)
    assert len(parts) == max(1, -(-(n - 1) // (length - 1)))


def test_windows_of_six_tokens_come_out_as_written_by_hand() -> None:
    parts = cut_windows(row([1, 2, 3, 4, 5, 6]), length=4)
    assert [ids.tolist() for ids, *_ in parts] == [[1, 2, 3, 4], [4, 5, 6]]
    assert [part.labels.tolist() for part in parts] == [[IGNORE, 2, 3, 4], [IGNORE, 5, 6]]
    with_bos = cut_windows(row([0, 2, 3, 4, 5, 6]), length=4, bos=0)
    assert [ids.tolist() for ids, *_ in with_bos] == [[0, 2, 3, 4], [0, 4, 5, 6]]
    assert with_bos[1][1].tolist() == [IGNORE, IGNORE, 5, 6]


def test_a_batch_of_two_packs_comes_out_as_written_by_hand() -> None:
    first = {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, IGNORE], "lengths": [2, 1]}
    second = {"input_ids": [4, 5], "labels": [IGNORE, 5], "lengths": [2]}
    batch = collate([{name: torch.tensor(value) for name, value in one.items()} for one in (first, second)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[IGNORE, 2, IGNORE, IGNORE, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1]]
    assert batch["documents"].tolist() == [[0, 0, 1, 2, 2]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_first_label_that_someone_set_is_ignored() -> None:
    packs = pack([TokenizedDocument([5, 6], [5, 6])], length=4)
    assert packs[0]["labels"].tolist() == [IGNORE, 6]


def test_windows_without_a_label_are_dropped_and_counted() -> None:
    rows = [row(list(range(10, 20)), [False] * 9 + [True]), *distinct(3)]
    packs = pack(rows, length=4)
    assert (packs.counts.split, packs.counts.dropped, packs.num_trained) == (1, 2, 3)


def test_each_bin_is_the_fullest_that_still_has_room() -> None:
    assert best_fit_decreasing([5, 4, 3, 2, 6], 8) == [[4, 3], [0, 2], [1]]
    assert best_fit_decreasing([8, 8], 8) == [[0], [1]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_is_near_the_fewest_packs(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, 20)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= 20 for members in bins)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 20) + 4 or min(lengths) > 6


def test_one_seed_gives_one_order_and_another_seed_another() -> None:
    rows = distinct(*[2 + i % 5 for i in range(60)])
    packs, again, other = pack(rows, length=8), pack(rows, length=8), pack(rows, length=8, seed=1)
    assert packs.digest == again.digest != other.digest
    assert sorted(packs.input_ids) == sorted(other.input_ids)
    assert packs.fill > 0.95


def test_packs_come_in_no_order_of_length() -> None:
    packs = pack(distinct(*[6] * 20, *[2] * 60), length=6)
    sizes = [len(packs[i]["lengths"]) for i in range(len(packs))]
    assert Counter(sizes) == {1: 20, 3: 20}
    assert sizes not in (sorted(sizes), sorted(sizes, reverse=True))


def test_packs_of_the_head_are_the_first_packs() -> None:
    packs = pack(distinct(*[3] * 20), length=6)
    few = packs.take(4)
    assert len(few) == 4
    assert all(torch.equal(few[i][name], packs[i][name]) for i in range(4) for name in packs[i])
    assert few.num_tokens == 24
    assert len(packs.take(10_000)) == len(packs)
    with pytest.raises(UsageError, match="0 packs"):
        packs.take(0)


def test_packs_travel_to_the_workers_of_a_loader() -> None:
    packs = pack(distinct(*[3] * 20), length=6)
    copy: Packs = pickle.loads(pickle.dumps(packs))
    assert copy.digest == packs.digest
    loader = DataLoader(packs, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    assert torch.cat([batch["input_ids"][0] for batch in loader]).tolist() == packs.input_ids.tolist()
    with pytest.raises(IndexError):
        packs[len(packs)]


def test_nothing_to_train_on_and_no_room_are_refused() -> None:
    with pytest.raises(DataError, match="no token to train on"):
        pack([row([1]), row([2, 3], [False, False])], length=4)
    with pytest.raises(UsageError, match="packs of 1 tokens"):
        pack(distinct(3), length=1)
    with pytest.raises(UsageError, match="packs of 2 tokens"):
        pack(distinct(3), length=2, bos=0)


def test_windows_keep_their_documents_route_and_packs_are_the_same_without() -> None:
    rows = distinct(30, 5, 12, 7, 41)
    routed = [one._replace(fields={"routes": n % 3}) for n, one in enumerate(rows)]
    plain, packs = pack(rows, length=16, bos=7), pack(routed, length=16, bos=7)
    assert "routes" not in plain.fields
    assert np.array_equal(plain.input_ids, packs.input_ids)
    assert plain.digest != packs.digest
    route = {token: n % 3 for n, one in enumerate(rows) for token in one.input_ids}
    batch = collate([packs[i] for i in range(len(packs))])
    for token, found in zip(batch["input_ids"][0].tolist(), batch["routes"][0].tolist(), strict=True):
        assert token == 7 or route[token] == found
    assert "routes" not in collate([plain[0]])
    first = packs.take(1)
    assert torch.equal(first[0]["routes"], packs[0]["routes"])
    assert len(first.fields["routes"]) == len(first.lengths)
