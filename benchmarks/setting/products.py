"""The matrix products that a step cannot do without, as a list of shapes, and how long they take alone."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Linear(NamedTuple):
    """`rows` states of width `inner` through a matrix [outer inner].

    `which` names the products that are computed: f(orward) y = x W^T, r(ows) x' = y' W, w(eight) W' = y'^T x.
    """

    rows: int
    inner: int
    outer: int
    which: str
    dtype: str = "bfloat16"

    @property
    def flops(self) -> int:
        """A multiply-add counts as two."""
        return 2 * self.rows * self.inner * self.outer * len(self.which)


class Network(NamedTuple):
    """The sizes of one network in a step: tokens that it reads, rows that are trained on, its head and its blocks."""

    tokens: int
    rows: int
    width: int
    vocabulary: int
    blocks: list[tuple[int, int]]

    def through_blocks(self, which: str) -> Iterator[Linear]:
        """Every matrix of its blocks."""
        return (Linear(self.tokens, inner, outer, which) for outer, inner in self.blocks)

    def through_head(self, which: str, rows: int | None = None) -> Iterator[Linear]:
        """Its head, so many rows at a time as the fused loss takes."""
        from potstill.ops.fused import rows_per_chunk

        left, most = self.rows if rows is None else rows, rows_per_chunk(self.vocabulary)
        while left > 0:
            yield Linear(min(left, most), self.width, self.vocabulary, which)
            left -= most


def seconds(listed: Sequence[Linear]) -> float:
    """What the products of a list take, one after the other, each with weights that no other has just used."""
    shelves = {kind: Shelf(kind, listed) for kind in {one.dtype for one in listed}}
    start = time.perf_counter()
    for one in listed:
        run(one, shelves[one.dtype])
    return time.perf_counter() - start


class Shelf:
    """Numbers of one dtype; each matrix that is taken begins where the one before it ended, as long as they last."""

    def __init__(self, kind: str, listed: Sequence[Linear]) -> None:
        own = [one for one in listed if one.dtype == kind]
        largest = max(max(o.rows * o.inner, o.inner * o.outer, o.rows * o.outer) for o in own)
        self.numbers = torch.randn(2 * max(largest, 2**24), dtype=DTYPES[kind])
        self.place = 0

    def take(self, rows: int, columns: int) -> Tensor:
        """A matrix."""
        if self.place + rows * columns > len(self.numbers):
            self.place = 0
        found = self.numbers[self.place : self.place + rows * columns].view(rows, columns)
        self.place += rows * columns
        return found


def run(one: Linear, shelf: Shelf) -> None:
    """The products of one matrix."""
    x, weight = shelf.take(one.rows, one.inner), shelf.take(one.outer, one.inner)
    y = x @ weight.mT if "f" in one.which else shelf.take(one.rows, one.outer)
    if "r" in one.which:
        y @ weight
    if "w" in one.which:
        y.mT @ x


def of_a_step(student: Network, teacher: Network, objective: Any, batch: Any) -> list[Linear]:
    """All products of a step of 0.7 cross-entropy + 0.3 `objective`; nothing for one that is not listed here.

    Attention inside the networks is left out. What two terms could share is counted once: the student's logits, the
    teacher's, and each projected one's.
    """
    own = list(of_the_objective(student, teacher, objective, batch))
    networks = [*teacher.through_blocks("f"), *student.through_blocks("frw"), *student.through_head("frw")]
    return [*networks, *own] if own else []


def of_the_objective(student: Network, teacher: Network, objective: Any, batch: Any) -> Iterator[Linear]:
    """The products beside both bodies and the student's own head."""
    from potstill.objectives.dskd import DSKD
    from potstill.objectives.dskdv2 import DSKDv2
    from potstill.objectives.logit_distillation import LogitDistillation
    from potstill.objectives.mined import MinED
    from potstill.objectives.spans import Spans
    from potstill.objectives.tie_kd import TieKD
    from potstill.objectives.uld import ULD

    match objective:
        case LogitDistillation() | TieKD():
            yield from teacher.through_head("f")
        case ULD():
            yield from teacher.through_head("f", *objective.counts(batch).values())
        case MinED():
            small = teacher._replace(vocabulary=student.vocabulary)  # no other row of the head is asked
            yield from small.through_head("f", int((objective.find_partners(batch) >= 0).sum()))
        case Spans():
            found = objective.classify_groups(batch)
            yield from teacher.through_head("f", len(found.token_rows[1]) + len(found.run_rows[1]))
            yield from student.through_head("f", len(found.run_rows[0]))
        case DSKD() | DSKDv2():
            yield from both_spaces(student, teacher, objective, batch)


def both_spaces(student: Network, teacher: Network, objective: Any, batch: Any) -> Iterator[Linear]:
    """Two projections, two foreign heads with a gradient by their rows, the teacher's own logits, and the way there."""
    from potstill.objectives.dskdv2 import DSKDv2
    from potstill.objectives.row_matching import CrossModelAttention

    ours, theirs = map(len, objective.bridge.match_rows(batch, "teacher"))
    mixing = isinstance(objective.bridge, CrossModelAttention)
    computed = isinstance(objective, DSKDv2)
    yield Linear(ours, teacher.width, student.width, "frw" if mixing else "fw")
    yield from student.through_head("fr", ours)
    yield Linear(theirs, student.width, teacher.width, "fr" if computed else "frw")
    yield from teacher.through_head("fr", theirs)
    yield from teacher.through_head("f", theirs)
    if computed:
        yield Linear(student.width, objective.shared_token_ids.value.shape[1], teacher.width, "f", "float32")
    if mixing:
        yield Linear(ours, 2 * student.width, 2 * teacher.width, "fw")
        yield from attended(student, teacher, batch)


def attended(student: Network, teacher: Network, batch: Any) -> Iterator[Linear]:
    """Scores of a document's rows beside the teacher's, and the two mixtures, in float32 as they are computed."""
    from potstill.core.types import get_view, supervised_positions

    mine, yours = (
        supervised_positions(get_view(batch, name))[2].bincount().tolist() for name in ("student", "teacher")
    )
    for n, m in zip(mine, yours, strict=False):
        if n and m:
            yield Linear(n, 2 * teacher.width, m, "fr", "float32")
            yield Linear(n, m, teacher.width, "fr", "float32")
            yield Linear(m, n, student.width, "frw", "float32")
