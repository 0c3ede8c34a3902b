"""What a teacher's row has to do with a student's: the same position, an exactly aligned token, or attention.

A bridge brings the teacher's hidden states to the student's rows and the student's to the teacher's.
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

MatchedRows = tuple[Int[Tensor, " P"], Int[Tensor, " Q"]]  # of the student and of the teacher


class MatchedStates(NamedTuple):
    """Hidden states on the other side.

    `to_student[p]` is for the student's row `ours[p]`, `to_teacher[q]` for the teacher's row `theirs[q]`. A bridge that
    pairs single rows gives both in the same order: the partner of `ours[p]` is `theirs[p]`.
    """

    student_rows: Int[Tensor, " P"]
    states_for_student: Float[Tensor, "P D"]
    teacher_rows: Int[Tensor, " Q"]
    states_for_teacher: Float[Tensor, "Q F"]


@runtime_checkable
class RowMatcher(Protocol):
    """How the rows of two networks belong together."""

    def needs(self, batch: Batch, teacher: str) -> Mapping[str, Needs]:
        """What is wanted of either network."""
        ...

    def match_rows(self, batch: Batch, teacher: str) -> MatchedRows:
        """Which rows of the student and of the teacher are brought over, from the batch alone."""
        ...

    def __call__(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> MatchedStates:
        """The states of both on the other side."""
        ...


class SameRowMatcher:
    """One tokenizer: row n is row n."""

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
    """The rows whose next token is the same piece of the same text: the batch's `pairs`, all rows where it has none."""

    def needs(self, batch: Batch, teacher: str) -> Mapping[str, Needs]:
        return make_row_needs(batch, teacher)

    def match_rows(self, batch: Batch, teacher: str) -> MatchedRows:
        """Those that are paired."""
        return match_aligned_rows(batch)

    def __call__(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> MatchedStates:
        student_rows, teacher_rows = match_aligned_rows(batch)
        return MatchedStates(student_rows, teacher.rows[teacher_rows], teacher_rows, student.rows[student_rows])


class CrossModelAttention(nn.Module):
    """Two tokenizers: A = Q K^T / sqrt(2 D), with Q = P_q [E_s(x); E_s(y)] and K = [E_t(x); E_t(y)] / std(E_t).

    x is a row's own token and y the one after it. The teacher's states are mixed as H_t / std(h_t) + E_t(y) / std(E_t)
    by softmax over its rows, the student's as they are by softmax over its own. Embeddings are constants; P_q is
    trained. Source: arXiv:2406.17328, section 3.2.

    Departs from the authors' code, whose two standard deviations are taken over all that a padded batch happens to
    hold: here std(E_t) is that of the teacher's whole embedding table, and each hidden state is divided by its own, so
    that padding and packing change nothing.
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
        """All supervised rows of both, but for those of a document of which the other has none."""
        return _intersect_rows(supervised_positions(batch)[2], supervised_positions(get_view(batch, teacher))[2])

    def forward(self, student: Signals, teacher: Signals, batch: Batch, name: str) -> MatchedStates:
        """Both mixtures."""
        queries = apply_padded(self.query, student.extras[EMBEDDINGS].detach().flatten(1))
        embeddings = teacher.extras[EMBEDDINGS].detach() / self.embedding_std
        states = teacher.rows.detach()
        state_std = states.to(torch.promote_types(states.dtype, torch.float32)).std(-1, keepdim=True)
        values = states / state_std.to(states.dtype) + embeddings[:, 1].to(states.dtype)
        documents = supervised_positions(batch)[2], supervised_positions(get_view(batch, name))[2]
        states_by_network = zip((student.rows, values), documents, strict=True)
        states_for_student, states_for_teacher = cross_attention(queries, embeddings.flatten(1), *states_by_network)
        student_rows, teacher_rows = _intersect_rows(*documents)
        return MatchedStates(
            student_rows, states_for_student[student_rows], teacher_rows, states_for_teacher[teacher_rows]
        )


def make_row_needs(batch: Batch, teacher: str) -> Mapping[str, Needs]:
    """Each network's own supervised rows."""
    return {
        "student": Needs(supervised_positions(batch)[0]),
        teacher: Needs(supervised_positions(get_view(batch, teacher))[0]),
    }


def match_same_rows(batch: Batch) -> MatchedRows:
    """Each row with itself."""
    rows = torch.arange(len(supervised_positions(batch)[1]), device=batch["labels"].device)
    return rows, rows


def match_aligned_rows(batch: Batch, key: str = ALIGNED_PAIRS) -> MatchedRows:
    """The student's and the teacher's rows that `batch[key]` pairs; without that key each row with itself."""
    if key in batch:
        student_rows, teacher_rows = batch[key]
        return student_rows, teacher_rows
    return match_same_rows(batch)


def match_rows_by_index(batch: Batch, teacher: str) -> MatchedRows:
    """The k-th row of the student in a document with the k-th of the teacher in it, as far as both go."""
    return _intersect_rows(
        *(_compute_row_keys(supervised_positions(get_view(batch, name))[2]) for name in ("student", teacher))
    )


def _compute_row_keys(documents: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """A number for each row that says its document and its place in it."""
    index = torch.arange(len(documents), device=documents.device) - torch.searchsorted(documents, documents)
    return documents * 2**31 + index


def _intersect_rows(student_numbers: Int[Tensor, " N"], teacher_numbers: Int[Tensor, " M"]) -> MatchedRows:
    """The places of either side whose number the other has too."""
    return _find_indices(torch.isin(student_numbers, teacher_numbers)), _find_indices(
        torch.isin(teacher_numbers, student_numbers)
    )


def _find_indices(mask: Bool[Tensor, " N"]) -> Int[Tensor, " P"]:
    return mask.nonzero()[:, 0]
