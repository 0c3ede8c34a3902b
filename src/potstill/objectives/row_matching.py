"""Matches rows of teacher and student: by position, by exactly aligned token, or by attention.

A row matcher maps the teacher's hidden states to the student's rows and the student's to the teacher's.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from potstill.core.types import ALIGNED_PAIRS, Batch, Needs, Signals, get_view, supervised_positions
from potstill.models.signals import EMBEDDINGS
from potstill.ops.cross_attention import cross_attention
from potstill.ops.layout import apply_padded
from potstill.ops.precision import upcast

MatchedRows = tuple[Int[Tensor, " P"], Int[Tensor, " Q"]]  # row indices of the student and of the teacher


class MatchedStates(NamedTuple):
    """Hidden states of each model at the rows of the other.

    `states_for_student[p]` belongs to the student's row `student_rows[p]`, and `states_for_teacher[q]` to the teacher's
    row `teacher_rows[q]`. A matcher of single rows gives both in the same order: `student_rows[p]` belongs to
    `teacher_rows[p]`.
    """

    student_rows: Int[Tensor, " P"]
    states_for_student: Float[Tensor, "P D"]
    teacher_rows: Int[Tensor, " Q"]
    states_for_teacher: Float[Tensor, "Q F"]


@runtime_checkable
class RowMatcher(Protocol):
    """Matches the rows of two models."""

    def needs(self, batch: Batch, teacher: str) -> Mapping[str, Needs]:
        """The needs of the matcher for each model."""
        ...

    def match_rows(self, batch: Batch, teacher: str) -> MatchedRows:
        """The matched rows of the student and of the teacher, from the batch alone."""
        ...

    def __call__(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> MatchedStates:
        """The states of both models at the rows of the other."""
        ...


class SameRowMatcher:
    """One tokenizer: row n belongs to row n."""

    def needs(self, batch: Batch, teacher: str) -> Mapping[str, Needs]:
        needs = Needs(supervised_positions(batch)[0])
        return {"student": needs, teacher: needs}

    def match_rows(self, batch: Batch, teacher: str) -> MatchedRows:
        """All supervised rows."""
        return match_same_rows(batch)

    def __call__(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> MatchedStates:
        rows = torch.arange(len(student.rows), device=student.rows.device)
        return MatchedStates(rows, teacher.rows, rows, student.rows)


class AlignedRowMatcher:
    """The rows whose next token covers the same bytes: the batch's `aligned.pairs`, or all rows without this key."""

    def needs(self, batch: Batch, teacher: str) -> Mapping[str, Needs]:
        return make_row_needs(batch, teacher)

    def match_rows(self, batch: Batch, teacher: str) -> MatchedRows:
        """The paired rows."""
        return match_aligned_rows(batch)

    def __call__(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> MatchedStates:
        student_rows, teacher_rows = match_aligned_rows(batch)
        return MatchedStates(student_rows, teacher.rows[teacher_rows], teacher_rows, student.rows[student_rows])


class CrossModelAttention(nn.Module):
    """Two tokenizers: A = Q K^T / sqrt(2 D), with Q = P_q [E_s(x); E_s(y)] and K = [E_t(x); E_t(y)] / std(E_t).

    x is a row's own token and y the token after it. The student's values are H_t / std(h_t) + E_t(y) / std(E_t),
    averaged by the softmax over the teacher's rows. The values for the teacher are the student's states, averaged by
    the softmax over the student's rows. Embeddings are constants; P_q is trained. Source: arXiv:2406.17328, section
    3.2.

    Departs from the authors' code, which takes both standard deviations over a whole padded batch. Here std(E_t)
    belongs to the teacher's embedding table, and each hidden state has its own std. So padding and packing change
    nothing.
    """

    def __init__(self, student_width: int, teacher_width: int, *, embedding_std: float) -> None:
        super().__init__()
        self.query = nn.Linear(2 * student_width, 2 * teacher_width)
        self.embedding_std = embedding_std  # the standard deviation of the teacher's embeddings

    def needs(self, batch: Batch, teacher: str) -> Mapping[str, Needs]:
        """The rows and the embeddings of both."""
        embedding_needs = Needs(extras=frozenset({EMBEDDINGS}))
        return {name: needs | embedding_needs for name, needs in make_row_needs(batch, teacher).items()}

    def match_rows(self, batch: Batch, teacher: str) -> MatchedRows:
        """The supervised rows of both models in documents where both have some."""
        return _intersect_rows(supervised_positions(batch)[2], supervised_positions(get_view(batch, teacher))[2])

    def forward(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> MatchedStates:
        """The averaged states for both models."""
        queries = apply_padded(self.query, student.extras[EMBEDDINGS].detach().flatten(1))
        embeddings = teacher.extras[EMBEDDINGS].detach() / self.embedding_std
        states = teacher.rows.detach()
        state_std = upcast(states).std(-1, keepdim=True)
        values = states / state_std.to(states.dtype) + embeddings[:, 1].to(states.dtype)
        documents = supervised_positions(batch)[2], supervised_positions(get_view(batch, name))[2]
        states_by_network = zip((student.rows, values), documents, strict=True)
        states_for_student, states_for_teacher = cross_attention(queries, embeddings.flatten(1), *states_by_network)
        student_rows, teacher_rows = _intersect_rows(*documents)
        return MatchedStates(
            student_rows, states_for_student[student_rows], teacher_rows, states_for_teacher[teacher_rows]
        )


def make_row_needs(batch: Batch, teacher: str) -> Mapping[str, Needs]:
    """The supervised rows of both models."""
    return {
        "student": Needs(supervised_positions(batch)[0]),
        teacher: Needs(supervised_positions(get_view(batch, teacher))[0]),
    }


def match_same_rows(batch: Batch) -> MatchedRows:
    """Each row with itself."""
    rows = torch.arange(len(supervised_positions(batch)[1]), device=batch["labels"].device)
    return rows, rows


def match_aligned_rows(batch: Batch, key: str = ALIGNED_PAIRS) -> MatchedRows:
    """The rows of student and teacher that `batch[key]` pairs; without that key each row with itself."""
    if key in batch:
        student_rows, teacher_rows = batch[key]
        return student_rows, teacher_rows
    return match_same_rows(batch)


def match_rows_by_index(batch: Batch, teacher: str) -> MatchedRows:
    """The student's k-th row of a document with the teacher's k-th row of it, until one of them ends."""
    return _intersect_rows(
        *(_compute_row_keys(supervised_positions(get_view(batch, name))[2]) for name in ("student", teacher))
    )


def _compute_row_keys(documents: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """A number for each row that identifies its document and its index there."""
    index = torch.arange(len(documents), device=documents.device) - torch.searchsorted(documents, documents)
    return documents * 2**31 + index


def _intersect_rows(student_numbers: Int[Tensor, " N"], teacher_numbers: Int[Tensor, " M"]) -> MatchedRows:
    """The indices on each side of the numbers that both sides have."""
    return _find_indices(torch.isin(student_numbers, teacher_numbers)), _find_indices(
        torch.isin(teacher_numbers, student_numbers)
    )


def _find_indices(mask: Bool[Tensor, " N"]) -> Int[Tensor, " P"]:
    return mask.nonzero()[:, 0]
