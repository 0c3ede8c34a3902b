"""What a teacher's last attention relates to what, taught without a common width or vocabulary (MiniLM)."""

from collections.abc import Mapping
from math import gcd
from typing import ClassVar

import torch
from torch import nn

from potstill.core.errors import UsageError
from potstill.core.types import Batch, Needs, Signals, Terms, supervised_positions
from potstill.models.signals import RELATIONS
from potstill.objectives.row_matching import make_row_needs, match_aligned_rows
from potstill.ops.layout import apply_padded
from potstill.ops.relation import relation_kl


class AttentionRelations(nn.Module):
    """1/3 sum over phi in {Q, K, V} of the relation divergence between teacher and student, summed over rows.

    The teacher's phi are the queries, keys and values of its last attention layer, before positions are put in. The
    student's are three learned maps without bias of its final hidden state, which are thrown away at the end: its own
    projections may have any width, and none of its layers has to be like the teacher's. Relations are between the
    supervised rows of one document; across tokenizers, between those of the batch's `pairs`.

    Source: Wang et al., MiniLMv2 (arXiv:2012.15828); the learned maps are those of MiniMoE's students
    (arXiv:2305.12129). Departs from both as `ops.relation` says, and in that rows which nothing is learnt at, such as
    prompts, are not related either.

    Raises: UsageError where the number of heads is no whole number that divides every width.
    """

    additive: ClassVar[bool] = True

    def __init__(self, student_width: int, widths: Mapping[str, int], *, heads: int, teacher: str = "teacher") -> None:
        super().__init__()
        if heads < 1 or any(width % heads for width in widths.values()):
            raise UsageError(f"{heads} relation heads do not divide the widths {dict(widths)}; choose a divisor of all")
        self.heads, self.teacher, self.name = heads, teacher, "relations"
        self.maps = nn.ModuleList(nn.Linear(student_width, widths[name], bias=False) for name in RELATIONS)

    @property
    def weights(self) -> Mapping[str, float]:
        """The one term, weighing 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The student's rows, the teacher's queries, keys and values."""
        row_needs = make_row_needs(batch, self.teacher)
        return {**row_needs, self.teacher: row_needs[self.teacher] | Needs(relations=frozenset(RELATIONS))}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of rows."""
        return {self.name: len(match_aligned_rows(batch)[0])}

    def forward(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """The sum over the batch."""
        student, teacher, (student_rows, teacher_rows) = (
            views["student"].rows,
            frozen[self.teacher],
            match_aligned_rows(batch),
        )
        documents = supervised_positions(batch)[2][student_rows]
        total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
        for name, projection in zip(RELATIONS, self.maps, strict=True):
            teacher_states = teacher.relations[name][teacher_rows].detach()
            total = total + relation_kl(
                teacher_states, apply_padded(projection, student[student_rows]), documents, heads=self.heads
            )
        return {self.name: total / len(self.maps)}


def find_num_heads(widths: Mapping[str, int], max_heads: int) -> int:
    """The largest number of heads, of `at_most`, that divides every width."""
    common_divisor = gcd(*widths.values())
    return max(heads for heads in range(1, max_heads + 1) if common_divisor % heads == 0)
