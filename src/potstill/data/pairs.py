"""The documents of a pack as a teacher with another tokenizer reads them, and which tokens of the two are the same.

    student          the | quick | br | own | <end>
    teacher   <bos>  the | quick | brown    | </s>      the same: the, quick, and the two ends

A window's ids say its text (`data.spans.read_back`), whoever wrote them, so that what a student writes itself is
translated as a corpus is. The teacher reads that text behind its own BOS, and the student's special tokens are no text
to it. Its tokens are trained on where all of their bytes are. A trained special token that ends a window (an end of
text, a stop token) is the teacher's end of text.
"""

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.types import IGNORE
from potstill.data.pack import Pack
from potstill.data.spans import Located, located, read_back
from potstill.models.pieces import Pieces
from potstill.ops import align

UNREADABLE = "potstill.unreadable"  # how bytes that are no text are decoded: each as one "?", so that bytes keep places


class Reader(NamedTuple):
    """A tokenizer, and what its ids stand for."""

    tokenizer: PreTrainedTokenizerBase
    pieces: Pieces


class Translated(NamedTuple):
    """A document as the teacher reads it; `same [P 2]` are the numbers of equal tokens, the student's first."""

    input_ids: Int64[Tensor, " M"]
    labels: Int64[Tensor, " M"]
    same: Int64[Tensor, "P 2"]


class Paired:
    """A data set of packs, each with what a teacher of another tokenizer reads beside it.

    To the keys of a pack come `teacher.input_ids [M]`, `teacher.labels [M]`, `teacher.lengths [documents]` and
    `aligned.tokens [P 2]`, numbers of tokens within the pack; `data.pack.collate` makes a batch of them.
    """

    def __init__(self, packs: Any, student: Reader, teacher: Reader, *, name: str = "teacher") -> None:
        self.packs, self.student, self.teacher, self.name = packs, student, teacher, name

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, i: int) -> Pack:
        return self.beside(self.packs[i])

    def beside(self, pack: Pack) -> Pack:
        """One pack with the teacher's reading of its documents."""
        sizes = pack["lengths"].tolist()
        windows = list(zip(pack["input_ids"].split(sizes), pack["labels"].split(sizes), strict=True))
        found = translate(windows, self.student, self.teacher)
        lengths = torch.tensor([len(one.input_ids) for one in found])
        starts = torch.stack([pack["lengths"].cumsum(0) - pack["lengths"], lengths.cumsum(0) - lengths], 1)
        same = [one.same + start for one, start in zip(found, starts, strict=True)]
        return {
            **pack,
            f"{self.name}.input_ids": torch.cat([one.input_ids for one in found]),
            f"{self.name}.labels": torch.cat([one.labels for one in found]),
            f"{self.name}.lengths": lengths,
            "aligned.tokens": torch.cat(same),
        }


def translate(windows: Sequence[tuple[Tensor, Tensor]], student: Reader, teacher: Reader) -> list[Translated]:
    """Each window of the student's ids and labels as the teacher reads it."""
    read = [read_back(ids.tolist(), student.pieces) for ids, _ in windows]
    texts = [data.decode(errors=UNREADABLE) for data, _ in read]
    others = located(texts, *teacher)
    return [
        _translated(data, spans, ids, labels, other, student.pieces, teacher)
        for (ids, labels), (data, spans), other in zip(windows, read, others, strict=True)
    ]


def _translated(
    data: bytes,
    spans: Tensor,
    ids: Tensor,
    labels: Tensor,
    other: Located,
    pieces: Pieces,
    teacher: Reader,
) -> Translated:
    theirs, their_spans = other
    trained = torch.zeros(len(data) + 1, dtype=torch.bool)
    for start, end in spans[labels != IGNORE].tolist():
        trained[start:end] = True
    if int(ids[-1]) in pieces.special and int(labels[-1]) != IGNORE and teacher.tokenizer.eos_token_id is not None:
        end_of_text = torch.tensor([[len(data), len(data) + 1]])  # one byte that both sides have, behind all others
        spans = torch.cat([spans[:-1], end_of_text])
        theirs = torch.cat([theirs, torch.tensor([teacher.tokenizer.eos_token_id])])
        their_spans = torch.cat([their_spans, end_of_text])
        trained[-1] = True
    learnt = torch.where(_within(their_spans, trained), theirs, IGNORE)
    learnt[:1] = IGNORE
    same = align.exact(spans, their_spans)
    readable = _within(spans[same[:, 0]], torch.from_numpy(_readable(data)))
    return Translated(theirs, learnt, same[readable])


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


def _unreadable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "?" * (error.end - error.start), error.end


codecs.register_error(UNREADABLE, _unreadable)
