"""A pack as a teacher with another tokenizer reads it, and which rows of the two belong together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.trained import byte_level, sentencepiece
from tests.objectives.crossed import batch_of, read
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.types import (
    ALIGNED_GROUPS,
    ALIGNED_PAIRS,
    EDIT_ALIGNED_PAIRS,
    IGNORE,
    get_view,
    supervised_positions,
)
from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks, TokenizerInfo, translate_windows
from potstill.data.packing import collate

TEXTS = ["The quick brown fox.", "世界 naïve café 🎉", "def read(path):\n    return open(path).read()\n"]


def reader(tokenizer: PreTrainedTokenizerBase) -> TokenizerInfo:
    return TokenizerInfo.from_tokenizer(tokenizer)


def pack_of(texts: list[str], student: TokenizerInfo, *, prompt: int = 0, ends: bool = True) -> dict[str, Tensor]:
    """Documents as a pack; all but the first `prompt` tokens are trained, the end of text too."""
    end = [student.tokenizer.eos_token_id] if ends else []
    rows = [student.tokenizer(text, add_special_tokens=False).input_ids + end for text in texts]
    labels = [[IGNORE] * max(1, prompt) + row[max(1, prompt) :] for row in rows]
    return {
        "input_ids": torch.tensor([i for row in rows for i in row]),
        "labels": torch.tensor([i for row in labels for i in row]),
        "lengths": torch.tensor([len(row) for row in rows]),
    }


def next_tokens(batch: dict[str, Tensor], rows: Tensor, known: TokenizerInfo) -> list[bytes]:
    """What the rows have to predict, in bytes; an end of text is `<end>`."""
    targets = supervised_positions(batch)[1][rows].tolist()
    return [b"<end>" if i == known.tokenizer.eos_token_id else known.pieces.by_id[i] for i in targets]


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_paired_rows_predict_the_same_bytes_and_every_document_keeps_its_number(scheme: str) -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece(scheme=scheme))
    batch = collate([CrossTokenizerPacks([pack_of(TEXTS, student)], student, teacher)[0]])
    theirs = get_view(batch, "teacher")
    ours, other = batch[ALIGNED_PAIRS]
    assert len(ours) >= 3
    assert next_tokens(batch, ours, student) == next_tokens(theirs, other, teacher)  # type: ignore[arg-type]
    assert torch.equal(supervised_positions(batch)[2][ours], supervised_positions(theirs)[2][other])
    assert bool((ours.diff() > 0).all())
    assert bool((other.diff() > 0).all())
    assert next_tokens(batch, ours, student).count(b"<end>") == len(TEXTS)


def test_packs_laid_together_pair_as_they_do_apart() -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece())
    paired = CrossTokenizerPacks([pack_of([text], student, prompt=2) for text in TEXTS], student, teacher)
    whole, parts = collate([paired[i] for i in range(3)]), [collate([paired[i]]) for i in range(3)]
    rows = torch.tensor(
        [[len(supervised_positions(p)[1]), len(supervised_positions(get_view(p, "teacher"))[1])] for p in parts]
    )
    starts = rows.cumsum(0) - rows
    expected = torch.cat(
        [part[ALIGNED_PAIRS] + start[:, None] for part, start in zip(parts, starts, strict=True)], dim=1
    )
    assert torch.equal(whole[ALIGNED_PAIRS], expected)


def test_a_prompt_is_trained_on_neither_side() -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece(scheme="never"))
    pack = CrossTokenizerPacks([pack_of([TEXTS[0]], student, prompt=5)], student, teacher)[0]
    unseen = b"".join(student.pieces.by_id[i] for i in pack["input_ids"][:5].tolist())
    learnt = pack["teacher.labels"] != IGNORE
    text = b"".join(teacher.pieces.by_id[i] for i in pack["teacher.input_ids"][learnt].tolist()[:-1])
    assert TEXTS[0].encode().endswith(text)
    assert len(text) <= len(TEXTS[0].encode()) - len(unseen)
    assert len(text) > 0


def test_a_tokenizer_beside_itself_pairs_every_row_with_itself() -> None:
    student = reader(byte_level())
    batch = collate([CrossTokenizerPacks([pack_of(TEXTS, student)], student, student)[0]])
    rows = torch.arange(len(supervised_positions(batch)[1]))
    assert torch.equal(batch[ALIGNED_PAIRS], torch.stack([rows, rows]))
    theirs = get_view(batch, "teacher")
    assert torch.equal(theirs["input_ids"], batch["input_ids"])
    assert torch.equal(theirs["labels"], batch["labels"])


def test_without_an_end_of_text_none_is_read() -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece())
    pack = CrossTokenizerPacks([pack_of([TEXTS[0]], student, ends=False)], student, teacher)[0]
    assert teacher.tokenizer.eos_token_id not in pack["teacher.input_ids"].tolist()


@given(ids=st.lists(st.integers(5, 300), min_size=2, max_size=40))
def test_whatever_ids_are_written_the_teacher_reads_a_text_and_pairs_none_but_equal_bytes(ids: list[int]) -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece(scheme="never"))
    tokens = torch.tensor(ids)
    (found,) = translate_windows([(tokens, tokens)], student, teacher)
    for mine, yours in found.equal_tokens.tolist():
        assert student.pieces.by_id[ids[mine]] == teacher.pieces.by_id[int(found.input_ids[yours])]
    assert len(found.labels) == len(found.input_ids)


def test_the_tables_are_those_that_objectives_are_tested_with_and_ends_of_text_beside() -> None:
    student, teacher = byte_level(), sentencepiece(scheme="never")
    expected = batch_of(TEXTS, student, teacher, prompt=3)
    packs = []
    for text in TEXTS:
        mine = read(text, student, 3)
        packs.append({"input_ids": mine.ids, "labels": mine.labels, "lengths": torch.tensor([len(mine.ids)])})
    paired = CrossTokenizerPacks(packs, reader(student), reader(teacher), needs_edit_alignment=True)
    found = collate([paired[i] for i in range(len(packs))])
    for key in (EDIT_ALIGNED_PAIRS, "teacher.input_ids", "documents", "teacher.documents"):
        assert torch.equal(found[key], expected[key]), key
    known, pairs = (set(map(tuple, batch[ALIGNED_PAIRS].T.tolist())) for batch in (expected, found))
    ends = {row for row in pairs if supervised_positions(found)[1][row[0]] == student.eos_token_id}
    assert pairs == known | ends
    assert len(ends) == len(TEXTS)
    for key in ALIGNED_GROUPS:
        assert (found[key] >= 0).sum() == (expected[key] >= 0).sum() + len(TEXTS)


def test_a_group_stands_for_the_same_bytes_on_both_sides() -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece(scheme="never"))
    batch = collate([CrossTokenizerPacks([pack_of(TEXTS, student)], student, teacher)[0]] * 2)
    sides = [(batch, ALIGNED_GROUPS[0], student), (get_view(batch, "teacher"), ALIGNED_GROUPS[1], teacher)]
    said = [
        [
            b"".join(next_tokens(one, (batch[key] == group).nonzero()[:, 0], known))  # type: ignore[arg-type]
            for group in range(int(batch[key].max()) + 1)
        ]
        for one, key, known in sides
    ]
    assert said[0] == said[1]
    assert len(said[0]) > 2 * len(TEXTS)
    assert all(said[0])


def test_of_a_text_that_is_too_long_the_teacher_reads_the_beginning_and_the_rest_is_aligned_with_nothing() -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece())
    pack = pack_of(TEXTS, student)
    whole, cut = (CrossTokenizerPacks([pack], student, teacher, max_length=n)[0] for n in (None, 5))
    assert cut["teacher.lengths"].tolist() == [min(n, 5) for n in whole["teacher.lengths"].tolist()]
    assert torch.equal(cut["input_ids"], whole["input_ids"])
    starts = (whole["teacher.lengths"].cumsum(0) - whole["teacher.lengths"]).tolist()
    kept = [torch.arange(start, start + 5) for start in starts]
    assert torch.equal(cut["teacher.input_ids"], whole["teacher.input_ids"][torch.cat(kept)])
    ours = {tuple(pair) for pair in whole["aligned.tokens"].tolist()}
    rows = [[first, starts[second // 5] + second % 5] for first, second in cut["aligned.tokens"].tolist()]
    assert 0 < len(rows) < len(ours)
    assert {tuple(row) for row in rows} <= ours
