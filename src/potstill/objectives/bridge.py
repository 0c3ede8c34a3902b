"""What a teacher's row has to do with a student's: the same position, an exactly aligned token, or attention.

A bridge brings the teacher's hidden states to the student's rows and the student's to the teacher's.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from potstill.core.types import PAIRS, Batch, Needs, Signals, supervised, view
from potstill.models.signals import EMBEDDINGS
from potstill.ops.cross import crossed
from potstill.ops.layout import through

Rows = tuple[Int[Tensor, " P"], Int[Tensor, " Q"]]  # of the student and of the teacher


class Bridged(NamedTuple):
    """Hidden states on the other side.

    `to_student[p]` is for the student's row `ours[p]`, `to_teacher[q]` for the teacher's row `theirs[q]`. A bridge that
    pairs single rows gives both in the same order: the partner of `ours[p]` is `theirs[p]`.
    """

    ours: Int[Tensor, " P"]
    to_student: Float[Tensor, "P D"]
    theirs: Int[Tensor, " Q"]
    to_teacher: Float[Tensor, "Q F"]


@runtime_checkable
class Bridge(Protocol):
    """How the rows of two networks belong together."""

    def needs(self, batch: Batch, teacher: str) -> Mapping[str, Needs]:
        """What is wanted of either network."""
        ...

    def reached(self, batch: Batch, teacher: str) -> Rows:
        """Which rows of the student and of the teacher are brought over, from the batch alone."""
        ...

    def __call__(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> Bridged:
        """The states of both on the other side."""
        ...


class SameRows:
    """One tokenizer: row n is row n."""

    def needs(self, batch: Batch, teacher: str) -> Mapping[str, Needs]:
        needs = Needs(supervised(batch)[0])
        return {"student": needs, teacher: needs}

    def reached(self, batch: Batch, teacher: str) -> Rows:
        """All supervised rows."""
        return every(batch)

    def __call__(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> Bridged:
        rows = torch.arange(len(student.rows), device=student.rows.device)
        return Bridged(rows, teacher.rows, rows, student.rows)


class AlignedRows:
    """The rows whose next token is the same piece of the same text: the batch's `pairs`, all rows where it has none."""

    def needs(self, batch: Batch, teacher: str) -> Mapping[str, Needs]:
        return each(batch, teacher)

    def reached(self, batch: Batch, teacher: str) -> Rows:
        """Those that are paired."""
        return aligned(batch)

    def __call__(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> Bridged:
        ours, theirs = aligned(batch)
        return Bridged(ours, teacher.rows[theirs], theirs, student.rows[ours])


class CrossAttention(nn.Module):
    """Two tokenizers: A = Q K^T / sqrt(2 D), with Q = P_q [E_s(x); E_s(y)] and K = [E_t(x); E_t(y)] / std(E_t).

    x is a row's own token and y the one after it. The teacher's states are mixed as H_t / std(h_t) + E_t(y) / std(E_t)
    by softmax over its rows, the student's as they are by softmax over its own. Embeddings are constants; P_q is
    trained. Source: arXiv:2406.17328, section 3.2.

    Departs from the authors' code, whose two standard deviations are taken over all that a padded batch happens to
    hold: here std(E_t) is that of the teacher's whole embedding table, and each hidden state is divided by its own, so
    that padding and packing change nothing.
    """

    def __init__(self, student_width: int, teacher_width: int, *, spread: float) -> None:
        super().__init__()
        self.query = nn.Linear(2 * student_width, 2 * teacher_width)
        self.spread = spread  # the standard deviation of the teacher's embeddings

    def needs(self, batch: Batch, teacher: str) -> Mapping[str, Needs]:
        """The rows and the embeddings of both."""
        wanted = Needs(extras=frozenset({EMBEDDINGS}))
        return {name: needs | wanted for name, needs in each(batch, teacher).items()}

    def reached(self, batch: Batch, teacher: str) -> Rows:
        """All supervised rows of both, but for those of a document of which the other has none."""
        return _met(supervised(batch)[2], supervised(view(batch, teacher))[2])

    def forward(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> Bridged:
        """Both mixtures."""
        queries = through(self.query, student.extras[EMBEDDINGS].detach().flatten(1))
        embedded = teacher.extras[EMBEDDINGS].detach() / self.spread
        states = teacher.rows.detach()
        spread = states.to(torch.promote_types(states.dtype, torch.float32)).std(-1, keepdim=True)
        values = states / spread.to(states.dtype) + embedded[:, 1].to(states.dtype)
        documents = supervised(batch)[2], supervised(view(batch, name))[2]
        both = zip((student.rows, values), documents, strict=True)
        to_student, to_teacher = crossed(queries, embedded.flatten(1), *both)
        ours, theirs = _met(*documents)
        return Bridged(ours, to_student[ours], theirs, to_teacher[theirs])


def each(batch: Batch, teacher: str) -> Mapping[str, Needs]:
    """Each network's own supervised rows."""
    return {"student": Needs(supervised(batch)[0]), teacher: Needs(supervised(view(batch, teacher))[0])}


def every(batch: Batch) -> Rows:
    """Each row with itself."""
    rows = torch.arange(len(supervised(batch)[1]), device=batch["labels"].device)
    return rows, rows


def aligned(batch: Batch, key: str = PAIRS) -> Rows:
    """The student's and the teacher's rows that `batch[key]` pairs; without that key each row with itself."""
    if key in batch:
        ours, theirs = batch[key]
        return ours, theirs
    return every(batch)


def by_place(batch: Batch, teacher: str) -> Rows:
    """The k-th row of the student in a document with the k-th of the teacher in it, as far as both go."""
    return _met(*(_placed(supervised(view(batch, name))[2]) for name in ("student", teacher)))


def _placed(documents: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """A number for each row that says its document and its place in it."""
    place = torch.arange(len(documents), device=documents.device) - torch.searchsorted(documents, documents)
    return documents * 2**31 + place


def _met(ours: Int[Tensor, " N"], theirs: Int[Tensor, " M"]) -> Rows:
    """The places of either side whose number the other has too."""
    return _where(torch.isin(ours, theirs)), _where(torch.isin(theirs, ours))


def _where(kept: Bool[Tensor, " N"]) -> Int[Tensor, " P"]:
    return kept.nonzero()[:, 0]
