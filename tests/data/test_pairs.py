"""A pack as a teacher with another tokenizer reads it, and which rows of the two belong together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.trained import byte_level, sentencepiece
from tests.objectives.crossed import batch_of, read
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UsageError
from potstill.core.types import GROUPS, IGNORE, PAIRS, WARPED, supervised, view
from potstill.data.pack import collate
from potstill.data.pairs import Paired, Reader, translate

TEXTS = ["The quick brown fox.", "世界 naïve café 🎉", "def read(path):\n    return open(path).read()\n"]


def reader(tokenizer: PreTrainedTokenizerBase) -> Reader:
    return Reader.of(tokenizer)


def pack_of(texts: list[str], student: Reader, *, prompt: int = 0, ends: bool = True) -> dict[str, Tensor]:
    """Documents as a pack; all but the first `prompt` tokens are trained, the end of text too."""
    end = [student.tokenizer.eos_token_id] if ends else []
    rows = [student.tokenizer(text, add_special_tokens=False).input_ids + end for text in texts]
    labels = [[IGNORE] * max(1, prompt) + row[max(1, prompt) :] for row in rows]
    return {
        "input_ids": torch.tensor([i for row in rows for i in row]),
        "labels": torch.tensor([i for row in labels for i in row]),
        "lengths": torch.tensor([len(row) for row in rows]),
    }


def next_tokens(batch: dict[str, Tensor], rows: Tensor, known: Reader) -> list[bytes]:
    """What the rows have to predict, in bytes; an end of text is `<end>`."""
    targets = supervised(batch)[1][rows].tolist()
    return [b"<end>" if i == known.tokenizer.eos_token_id else known.pieces.of[i] for i in targets]


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_paired_rows_predict_the_same_bytes_and_every_document_keeps_its_number(scheme: str) -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece(scheme=scheme))
    batch = collate([Paired([pack_of(TEXTS, student)], student, teacher)[0]])
    theirs = view(batch, "teacher")
    ours, other = batch[PAIRS]
    assert len(ours) >= 3
    assert next_tokens(batch, ours, student) == next_tokens(theirs, other, teacher)  # type: ignore[arg-type]
    assert torch.equal(supervised(batch)[2][ours], supervised(theirs)[2][other])
    assert bool((ours.diff() > 0).all())
    assert bool((other.diff() > 0).all())
    assert next_tokens(batch, ours, student).count(b"<end>") == len(TEXTS)


def test_packs_laid_together_pair_as_they_do_apart() -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece())
    paired = Paired([pack_of([text], student, prompt=2) for text in TEXTS], student, teacher)
    whole, parts = collate([paired[i] for i in range(3)]), [collate([paired[i]]) for i in range(3)]
    rows = torch.tensor([[len(supervised(p)[1]), len(supervised(view(p, "teacher"))[1])] for p in parts])
    starts = rows.cumsum(0) - rows
    expected = torch.cat([part[PAIRS] + start[:, None] for part, start in zip(parts, starts, strict=True)], dim=1)
    assert torch.equal(whole[PAIRS], expected)


def test_a_prompt_is_trained_on_neither_side() -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece(scheme="never"))
    pack = Paired([pack_of([TEXTS[0]], student, prompt=5)], student, teacher)[0]
    unseen = b"".join(student.pieces.of[i] for i in pack["input_ids"][:5].tolist())
    learnt = pack["teacher.labels"] != IGNORE
    text = b"".join(teacher.pieces.of[i] for i in pack["teacher.input_ids"][learnt].tolist()[:-1])
    assert TEXTS[0].encode().endswith(text)
    assert len(text) <= len(TEXTS[0].encode()) - len(unseen)
    assert len(text) > 0


def test_a_tokenizer_beside_itself_pairs_every_row_with_itself() -> None:
    student = reader(byte_level())
    batch = collate([Paired([pack_of(TEXTS, student)], student, student)[0]])
    rows = torch.arange(len(supervised(batch)[1]))
    assert torch.equal(batch[PAIRS], torch.stack([rows, rows]))
    theirs = view(batch, "teacher")
    assert torch.equal(theirs["input_ids"], batch["input_ids"])
    assert torch.equal(theirs["labels"], batch["labels"])


def test_without_an_end_of_text_none_is_read() -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece())
    pack = Paired([pack_of([TEXTS[0]], student, ends=False)], student, teacher)[0]
    assert teacher.tokenizer.eos_token_id not in pack["teacher.input_ids"].tolist()


@given(ids=st.lists(st.integers(5, 300), min_size=2, max_size=40))
def test_whatever_ids_are_written_the_teacher_reads_a_text_and_pairs_none_but_equal_bytes(ids: list[int]) -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece(scheme="never"))
    tokens = torch.tensor(ids)
    (found,) = translate([(tokens, tokens)], student, teacher)
    for mine, yours in found.same.tolist():
        assert student.pieces.of[ids[mine]] == teacher.pieces.of[int(found.input_ids[yours])]
    assert len(found.labels) == len(found.input_ids)


def test_the_tables_are_those_that_objectives_are_tested_with_and_ends_of_text_beside() -> None:
    student, teacher = byte_level(), sentencepiece(scheme="never")
    expected = batch_of(TEXTS, student, teacher, prompt=3)
    packs = []
    for text in TEXTS:
        mine = read(text, student, 3)
        packs.append({"input_ids": mine.ids, "labels": mine.labels, "lengths": torch.tensor([len(mine.ids)])})
    paired = Paired(packs, reader(student), reader(teacher), warped=True)
    found = collate([paired[i] for i in range(len(packs))])
    for key in (WARPED, "teacher.input_ids", "documents", "teacher.documents"):
        assert torch.equal(found[key], expected[key]), key
    known, pairs = (set(map(tuple, batch[PAIRS].T.tolist())) for batch in (expected, found))
    ends = {row for row in pairs if supervised(found)[1][row[0]] == student.eos_token_id}
    assert pairs == known | ends
    assert len(ends) == len(TEXTS)
    for key in GROUPS:
        assert (found[key] >= 0).sum() == (expected[key] >= 0).sum() + len(TEXTS)


def test_a_group_stands_for_the_same_bytes_on_both_sides() -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece(scheme="never"))
    batch = collate([Paired([pack_of(TEXTS, student)], student, teacher)[0]] * 2)
    sides = [(batch, GROUPS[0], student), (view(batch, "teacher"), GROUPS[1], teacher)]
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


def test_a_text_that_is_too_long_for_the_teacher_is_refused_with_what_to_do() -> None:
    student, teacher = reader(byte_level()), reader(sentencepiece())
    paired = Paired([pack_of(TEXTS, student)], student, teacher, longest=5)
    with pytest.raises(UsageError, match="reads 5 at most; give a smaller --context"):
        paired[0]
