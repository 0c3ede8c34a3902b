"""Laws of every declared field, and groups that stay together."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.core.errors import DataError, UsageError
from potstill.core.types import IGNORE, Needs, select_routed_documents, supervised_positions
from potstill.data import pack_fields
from potstill.data.pack_fields import (
    GROUPS,
    OFFSETS,
    PackField,
    declare_field,
    get_field,
    join_fields,
    list_fields,
    split_fields,
    to_tensor,
)
from potstill.data.packing import Packs, collate, pack
from potstill.data.token_dataset import TokenDataset, TokenizedDocument
from potstill.data.windows import cut_windows
from potstill.ops.layout import unpack

WEIGHT = declare_field(PackField("test_weight", per="token", dtype="float32", fill=0.5))
SCORE = declare_field(PackField("test_score", per="document", dtype="float32", fill=-2.5))
FLAG = declare_field(PackField("test_flag", per="document", dtype="bool", fill=False, repeated=True))


FIELDS = [field for field in list_fields() if field is not OFFSETS]  # offsets belong to prompts: test_shared_prompts


def value_of(field: PackField, n: int, length: int) -> object:
    """A value that tells document n (and its tokens) from every other."""
    values = [
        t % 2 == 0 if field.dtype == "bool" else 100 * n + t + (0.25 if field.dtype == "float32" else 0)
        for t in range(length)
    ]
    return values if field.per == "token" else values[n % 2] if field.dtype == "bool" else values[0]


def rows_with(fields: list[PackField], *lengths: int) -> list[TokenizedDocument]:
    """Documents that hold the fields; each has tokens of its own."""
    rows = []
    for n, length in enumerate(lengths):
        ids = list(range(1000 * (n + 1), 1000 * (n + 1) + length))
        values = {field.name: value_of(field, n, length) for field in fields if field is not GROUPS}
        rows.append(TokenizedDocument(ids, list(ids), values | ({"groups": n // 2} if GROUPS in fields else {})))
    return rows


def documents_in(batch: dict[str, Tensor]) -> Iterator[tuple[int, int, dict[str, list[float]]]]:
    """(first token, number, fields) of each document of a packed or a padded batch, as an objective reads them."""
    for number in batch["documents"][batch["documents"] >= 0].unique().tolist():
        mask = batch["documents"] == number
        fields = {}
        for field in list_fields():
            if field.name in batch:
                values = batch[field.name]
                in_tokens = field.per == "token" or field.repeated
                fields[field.name] = (values[mask] if in_tokens else values[number][None]).tolist()
        yield int(batch["input_ids"][mask][0]), number, fields


LENGTHS = (3, 4, 2, 5, 4, 3, 6, 2)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_field_is_the_same_after_pack_collate_and_unpack(field: PackField) -> None:
    rows = TokenDataset(enumerate(rows_with([field], *LENGTHS)))
    packs = pack(rows, length=12, seed=3)
    assert len(packs) > 1
    batch = collate([packs[i] for i in range(len(packs))])
    for layout in (batch, unpack(batch)):
        found = {first // 1000 - 1: fields[field.name] for first, _, fields in documents_in(layout)}
        assert found.keys() == set(range(len(LENGTHS)))
        for n, length in enumerate(LENGTHS):
            if field is not GROUPS:
                expected = value_of(field, n, length)
                expected = expected if field.per == "token" else [expected] * (length if field.repeated else 1)
                assert found[n] == expected
    split = split_fields(batch, torch.bincount(batch["documents"][0]).tolist())
    joined = join_fields(split, torch.bincount(batch["documents"][0]).tolist())
    assert np.array_equal(joined[field.name], np.concatenate([packs.fields[field.name]])) or field is GROUPS


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_permutation_of_padded_rows_gives_the_same_documents(field: PackField) -> None:
    packs = pack(rows_with([field], *LENGTHS), length=12)
    padded = unpack(collate([packs[i] for i in range(len(packs))]))
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(1))
    shape = padded["input_ids"].shape
    permuted = {name: values[order] if values.shape == shape else values for name, values in padded.items()}
    assert list(documents_in(permuted)) == list(documents_in(padded))


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_the_first_packs_hold_the_field_and_a_digest_knows_it(field: PackField) -> None:
    rows = rows_with([field], *LENGTHS)
    packs = pack(rows, length=12)
    plain = pack([row._replace(fields={}) for row in rows], length=12)
    if field is not GROUPS:
        assert np.array_equal(packs.input_ids, plain.input_ids)
    assert packs.digest != plain.digest
    head = packs.take(1)
    assert torch.equal(head[0][field.name], packs[0][field.name])
    assert len(head.fields[field.name]) == (head.num_tokens if field.per == "token" else len(head.lengths))


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_document_without_the_field_gets_its_fill(field: PackField) -> None:
    first, second = rows_with([field], 3, 4)
    batches = [
        collate([pack([first], length=8)[0], pack([second._replace(fields={})], length=8)[0]]),
        collate([pack([first, second._replace(fields={})], length=8)[0]]),
    ]
    for batch in batches:
        found = {token // 1000: fields[field.name] for token, _, fields in documents_in(batch)}
        assert set(found[2]) == {field.fill}
        assert set(found[1]) != {field.fill} or field is FLAG


def test_windows_of_a_long_document_hold_its_fields() -> None:
    row = TokenizedDocument([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], {"test_weight": [1, 2, 3, 4, 5, 6], "routes": 2})
    windows = cut_windows(row, length=4, bos=0)
    assert [window.fields["test_weight"].tolist() for window in windows] == [[1, 2, 3, 4], [0.5, 4, 5, 6]]
    assert [int(window.fields["routes"]) for window in windows] == [2, 2]


def test_each_target_is_used_once_and_keeps_a_window_without_labels() -> None:
    row = TokenizedDocument([1, 2, 3, 4, 5, 6], [IGNORE] * 6, {"targets": [11, 12, 13, 14, 15, 16]})
    windows = cut_windows(row, length=4, bos=0)
    assert [window.fields["targets"].tolist() for window in windows] == [
        [11, 12, 13, 14],
        [IGNORE, IGNORE, 15, 16],
    ]
    assert len(pack([row], length=4)) == 2


def grouped(*members: tuple[int, ...], start: int = 0) -> list[TokenizedDocument]:
    """Documents of these lengths, a group for each tuple."""
    return [
        row._replace(fields={"groups": start + number})
        for number, lengths in enumerate(members)
        for row in rows_with([], *lengths)
    ]


def groups_by_pack(packs: Packs) -> list[list[int]]:
    return [packs[i]["groups"].tolist() for i in range(len(packs))]


def test_a_group_stays_in_one_pack_side_by_side_and_in_order() -> None:
    packs = pack(grouped(*[(5, 3)] * 6, *[(2, 2, 2)] * 5), length=12, seed=2)
    seen = [number for numbers in groups_by_pack(packs) for number in dict.fromkeys(numbers)]
    assert sorted(seen) == list(range(11))
    for i, numbers in enumerate(groups_by_pack(packs)):
        for number in set(numbers):
            places = [place for place, other in enumerate(numbers) if other == number]
            assert places == list(range(places[0], places[0] + len(places)))
            starts = packs[i]["lengths"].cumsum(0) - packs[i]["lengths"]
            firsts = packs[i]["input_ids"][starts[places]].tolist()
            assert firsts == sorted(firsts)


def test_a_batch_numbers_groups_on_from_pack_to_pack_and_leaves_out_none() -> None:
    alone = TokenizedDocument([1, 2], [1, 2])
    packs = pack([*grouped((2, 2), (2, 2), start=7), alone], length=4)
    batch = collate([packs[i] for i in range(len(packs))])
    again = collate([packs[0], packs[0]])
    assert sorted(batch["groups"].tolist()) == [-1, 0, 0, 1, 1]
    assert again["groups"].tolist() in ([0, 0, 1, 1], [-1, -1])


def test_a_group_that_does_not_fit_is_dropped_whole_and_counted() -> None:
    packs = pack(grouped((5, 6), (3, 4), (20, 2), (4, 4)), length=10)
    assert packs.counts.dropped_groups == 2
    assert sorted(number for numbers in groups_by_pack(packs) for number in numbers) == [1, 1, 3, 3]
    with pytest.raises(DataError, match=r"none of the 1 groups .* 10 tokens; the smallest has 11"):
        pack(grouped((5, 6)), length=10)


def test_a_group_keeps_documents_without_labels_and_goes_if_a_window_is_refused() -> None:
    query, answer = grouped((3, 3))
    packs = pack([query._replace(labels=[IGNORE] * 3), answer], length=8)
    assert packs[0]["lengths"].tolist() == [3, 3]
    rows = [query, answer, TokenizedDocument([7, 8], [7, 8])]
    packs = pack(rows, length=8, keep_window=lambda ids, labels: ids[0] != answer.input_ids[0])
    assert (packs.counts.dropped_groups, packs[0]["input_ids"].tolist()) == (1, [7, 8])


def test_documents_selected_by_route_keep_what_is_known_of_documents() -> None:
    rows = rows_with([get_field("routes"), SCORE], 3, 3)
    rows = [row._replace(fields={**row.fields, "routes": n}) for n, row in enumerate(rows)]
    batch = collate([pack(rows, length=8)[0]])
    needs = Needs(supervised_positions(batch)[0] & (batch["routes"] == 1))
    selected, _ = select_routed_documents(batch, needs)
    ((first, number, fields),) = documents_in(dict(selected))
    assert (first // 1000 - 1, fields["test_score"]) == (1, batch["test_score"][number][None].tolist())


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: PackField("labels", per="token"), "cannot be called 'labels'"),
        (lambda: PackField("a.b", per="token"), "cannot be called 'a.b'"),
        (lambda: PackField("x", per="document", dtype="int64"), "int64 per document"),
        (lambda: PackField("x", per="token", repeated=True), "is per token"),
        (lambda: declare_field(PackField("routes", per="token")), "another field of packs called 'routes'"),
        (lambda: get_field("unknown"), "no field of packs called 'unknown'"),
        (lambda: pack([TokenizedDocument([1, 2], [1, 2], {"unknown": 1})], length=4), "declare_field"),
    ],
)
def test_a_wrong_declaration_is_refused_in_one_sentence(declare: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        declare()  # type: ignore[operator]
    assert "x" not in pack_fields._FIELDS


def test_a_value_for_each_token_is_asked_of_a_field_per_token() -> None:
    with pytest.raises(DataError, match="holds 2 values for a document of 3 tokens"):
        TokenDataset([(0, TokenizedDocument([1, 2, 3], [1, 2, 3], {"test_weight": [1.0, 2.0]}))])


def test_integers_are_int64_in_a_batch_and_other_values_as_declared() -> None:
    assert to_tensor(np.zeros(2, np.int32)).dtype == torch.int64
    packs = pack(rows_with([WEIGHT, FLAG, SCORE], 3), length=4)
    batch = collate([packs[0]])
    assert [batch[field.name].dtype for field in (WEIGHT, FLAG, SCORE)] == [torch.float32, torch.bool, torch.float32]
    assert [batch[field.name].shape for field in (WEIGHT, FLAG, SCORE)] == [(1, 3), (1, 3), (1,)]
