"""The documents of a pack as a teacher with another tokenizer reads them, and which tokens of the two are the same.

    student          the | quick | br | own | <end>
    teacher   <bos>  the | quick | brown    | </s>      the same: the, quick, and the two ends

A window's ids say its text (`data.spans.read_back`), whoever wrote them, so that what a student writes itself is
translated as a corpus is. The teacher reads that text behind its own BOS, and the student's special tokens are no text
to it; a chat it reads as its own template writes one (`data.turns`), the tokens that end an answer being the same. Its
tokens are trained on where all of their bytes are. A trained special token that ends a text is its end of text.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UsageError
from potstill.core.types import GROUPS, IGNORE, PAIRS, WARPED, supervised
from potstill.data.pack import Pack, collate
from potstill.data.spans import Located, located, read_back, readable
from potstill.data.turns import Marks, Retold, retold
from potstill.models.pieces import Pieces, pieces
from potstill.ops import align, edit


class Reader(NamedTuple):
    """A tokenizer, what its ids stand for, and the marks between the turns of a chat where chats are to be read."""

    tokenizer: PreTrainedTokenizerBase
    pieces: Pieces
    marks: Marks | None = None
    dummy: bool = False  # whether the tokenizer puts a space before a text, as SentencePiece does

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Reader":
        """One of text."""
        known = pieces(tokenizer)
        told = read_back(tokenizer("a", add_special_tokens=False).input_ids, known)[0]
        return cls(tokenizer, known, dummy=told == b" a")


@lru_cache(maxsize=4)  # a run asks several times, and a vocabulary of 262k ids takes a while to read
def readers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, chats: bool
) -> tuple[Reader, Reader]:
    """Student and teacher, as they read text or `chats`. A teacher without a template for them reads line by line."""
    ours, theirs = Reader.of(student), Reader.of(teacher)
    marks = Marks.learnt(student, ours.pieces) if chats else None
    if marks is None:
        return ours, theirs
    others = Marks.learnt(teacher, theirs.pieces) or Marks.plain(teacher)
    return ours._replace(marks=marks), theirs._replace(marks=others)


class Translated(NamedTuple):
    """A document as the teacher reads it, and how its tokens lie beside the student's.

    `same [P 2]` are the numbers of equal tokens, the student's first. `groups` numbers the runs of trained tokens that
    stand for the same bytes together, for each token of either side, -1 for none. `warped [W 2]` pairs the tokens that
    rows are read at by minimum edit distance, where that was asked for.
    """

    input_ids: Int64[Tensor, " M"]
    labels: Int64[Tensor, " M"]
    same: Int64[Tensor, "P 2"]
    groups: align.Groups
    warped: Int64[Tensor, "W 2"]


class Paired:
    """A data set of packs, each with what a teacher of another tokenizer reads beside it.

    To the keys of a pack come `teacher.input_ids [M]`, `teacher.labels [M]`, `teacher.lengths [documents]`, and with
    numbers of tokens within the pack `aligned.tokens [P 2]`, `aligned.groups [T]`, `aligned.teacher_groups [M]` and, if
    `warped`, `aligned.warped [W 2]`; `data.pack.collate` makes a batch of them.
    """

    def __init__(
        self, packs: Any, student: Reader, teacher: Reader, *, warped: bool = False, longest: int | None = None
    ) -> None:
        self.packs, self.student, self.teacher, self.warped = packs, student, teacher, warped
        self.longest = longest  # tokens that the teacher can read at once

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, i: int) -> Pack:
        return self.beside(self.packs[i])

    def beside(self, pack: Pack) -> Pack:
        """One pack with the teacher's reading of its documents."""
        sizes = pack["lengths"].tolist()
        windows = list(zip(pack["input_ids"].split(sizes), pack["labels"].split(sizes), strict=True))
        found = translate(windows, self.student, self.teacher, warp=self.warped)
        lengths = torch.tensor([len(one.input_ids) for one in found])
        if self.longest is not None and (most := int(lengths.max())) > self.longest:
            raise UsageError(
                f"{int(pack['lengths'].max())} tokens of the student are {most} of the teacher's, which reads "
                f"{self.longest} at most; give a smaller --context"
            )
        starts = torch.stack([pack["lengths"].cumsum(0) - pack["lengths"], lengths.cumsum(0) - lengths], 1)
        totals = torch.tensor([one.groups.total for one in found])
        first = totals.cumsum(0) - totals
        return {
            **pack,
            "teacher.input_ids": torch.cat([one.input_ids for one in found]),
            "teacher.labels": torch.cat([one.labels for one in found]),
            "teacher.lengths": lengths,
            "aligned.tokens": torch.cat([one.same + start for one, start in zip(found, starts, strict=True)]),
            GROUPS[0]: _numbered([one.groups.first for one in found], first),
            GROUPS[1]: _numbered([one.groups.second for one in found], first),
            **(
                {WARPED: torch.cat([one.warped + s for one, s in zip(found, starts, strict=True)])}
                if self.warped
                else {}
            ),
        }


class _Read(NamedTuple):
    """A window as text for the teacher; the bytes that both texts have, and where each student token lies in them.

    `told` says which bytes of `text` these are; None where they are all of it.
    """

    text: str
    data: bytes
    spans: Int64[Tensor, "T 2"]
    told: Retold | None


def translate(
    windows: Sequence[tuple[Tensor, Tensor]], student: Reader, teacher: Reader, *, warp: bool = False
) -> list[Translated]:
    """Each window of the student's ids and labels as the teacher reads it: through its template if both have marks."""
    read = [_read(ids.tolist(), student, teacher) for ids, _ in windows]
    plain = student.marks is None or teacher.marks is None
    others = located([one.text for one in read], teacher.tokenizer, teacher.pieces, specials=plain)
    return [
        _translated(one, ids, labels, other, student.pieces, teacher, warp=warp)
        for (ids, labels), one, other in zip(windows, read, others, strict=True)
    ]


def _read(ids: Sequence[int], student: Reader, teacher: Reader) -> _Read:
    if student.marks is None or teacher.marks is None:
        data, spans = read_back(ids, student.pieces)
        if data[:1] == b" " and student.dummy:  # put in front by the student's tokenizer; in no text
            data, spans = data[1:], (spans - 1).clamp(min=0)
        return _Read(readable(data), data, spans, None)
    data, spans = read_back(ids, student.pieces, shown=student.marks.special)
    told = retold(data, student.marks, teacher.marks)
    return _Read(told.text, told.shared, align.shared(spans, told.own, told.common), told)


def _translated(
    read: _Read, ids: Tensor, labels: Tensor, other: Located, pieces: Pieces, teacher: Reader, *, warp: bool
) -> Translated:
    data, spans = read.data, read.spans
    theirs, their_spans = _unended(other, teacher)
    if read.told is not None:
        their_spans = align.shared(their_spans, read.told.theirs, read.told.common)
    trained = torch.zeros(len(data) + 1, dtype=torch.bool)
    for start, end in spans[labels != IGNORE].tolist():
        trained[start:end] = True
    if _ends(ids, labels, spans, pieces) and teacher.tokenizer.eos_token_id is not None:
        end_of_text = torch.tensor([[len(data), len(data) + 1]])  # one byte that both sides have, behind all others
        spans = torch.cat([spans[:-1], end_of_text])
        theirs = torch.cat([theirs, torch.tensor([teacher.tokenizer.eos_token_id])])
        their_spans = torch.cat([their_spans, end_of_text])
        trained[-1] = True
    learnt = torch.where(_within(their_spans, trained), theirs, IGNORE)
    learnt[:1] = IGNORE
    clear = torch.from_numpy(_readable(data))
    spans, their_spans = (_only(some, _within(some, clear)) for some in (spans, their_spans))
    learning, others = labels != IGNORE, learnt != IGNORE
    learning[:1] = False
    groups = align.merged(_only(spans, learning), _only(their_spans, others))
    warped = torch.empty(0, 2, dtype=torch.long)
    if warp:
        warped = _warped((ids, learning, pieces), (theirs, others, teacher.pieces))
    return Translated(theirs, learnt, align.exact(spans, their_spans), groups, warped)


def _unended(other: Located, teacher: Reader) -> Located:
    """Without the end of text that some tokenizers put behind every text, whether it ends there or not."""
    ids, spans = other
    added = len(ids) and int(ids[-1]) == teacher.tokenizer.eos_token_id and int(spans[-1, 0]) == int(spans[-1, 1])
    return Located(ids[:-1], spans[:-1]) if added else other


def _ends(ids: Tensor, labels: Tensor, spans: Tensor, pieces: Pieces) -> bool:
    """Whether a window ends with a special token that is trained and stands for no byte yet: an end of text."""
    return bool(int(ids[-1]) in pieces.special and labels[-1] != IGNORE and spans[-1, 0] == spans[-1, 1])


def _warped(student: tuple[Tensor, Tensor, Pieces], teacher: tuple[Tensor, Tensor, Pieces]) -> Int64[Tensor, "W 2"]:
    """The pairs of tokens that rows are read at, one before each trained token, that warping puts with one another."""
    places = [learning.nonzero()[:, 0] - 1 for _, learning, _ in (student, teacher)]
    (ours, ids, known), (theirs, other_ids, other_known) = (
        (place, side[0], side[2]) for place, side in zip(places, (student, teacher), strict=True)
    )
    own = [known.of[i].strip() for i in ids[ours].tolist()]
    other = [other_known.of[i].strip() for i in other_ids[theirs].tolist()]
    if not own or not other:
        return torch.empty(0, 2, dtype=torch.long)
    alone = edit.alone(edit.warped(edit.table(other, own)), len(own))
    kept = (alone >= 0).nonzero()[:, 0]
    return torch.stack([ours[kept], theirs[alone[kept]]], 1)


def _only(spans: Int64[Tensor, "T 2"], kept: Bool[Tensor, " T"]) -> Int64[Tensor, "T 2"]:
    """`spans`, those that are not kept empty."""
    return torch.where(kept[:, None], spans, spans[:, :1])


def _numbered(groups: Sequence[Int64[Tensor, " _"]], first: Int64[Tensor, " D"]) -> Int64[Tensor, " T"]:
    """The groups of documents, counted on from document to document."""
    return torch.cat([torch.where(one >= 0, one + start, -1) for one, start in zip(groups, first, strict=True)])


def _within(spans: Int64[Tensor, "T 2"], held: Bool[Tensor, " bytes"]) -> Bool[Tensor, " T"]:
    """Which spans are not empty and have only bytes that are held."""
    before = torch.cat([torch.zeros(1, dtype=torch.long), held.long().cumsum(0)])
    sizes = spans[:, 1] - spans[:, 0]
    return (sizes > 0) & (before[spans[:, 1]] - before[spans[:, 0]] == sizes)


def _readable(data: bytes) -> Bool[np.ndarray, " bytes_and_one"]:
    """Which bytes are part of a character, and the place behind them."""
    told = np.ones(len(data) + 1, dtype=bool)
    place = 0
    while place < len(data):
        try:
            data[place:].decode()
            break
        except UnicodeDecodeError as error:
            told[place + error.start : place + error.end] = False
            place += error.end
    return told


def aligned_share(packs: "Paired", *, most: int = 16) -> float:
    """The share of the rows trained on whose next token the teacher has too, in the first packs."""
    batches = [collate([packs[i]]) for i in range(min(most, len(packs)))]
    rows = sum(len(supervised(batch)[1]) for batch in batches)
    return sum(batch[PAIRS].shape[1] for batch in batches) / max(1, rows)
