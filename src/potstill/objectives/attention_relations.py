"""Relations between rows in the teacher's last attention layer (MiniLM), without a common width or vocabulary."""

from collections.abc import Mapping
from math import gcd
from typing import ClassVar

import torch
from torch import nn

from potstill.core.errors import UsageError
from potstill.core.types import Batch, Needs, Objective, Signals, Terms, supervised_positions
from potstill.models.signals import RELATIONS
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.row_matching import make_row_needs, match_aligned_rows
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.layout import apply_padded
from potstill.ops.relation import relation_kl


class AttentionRelations(nn.Module):
    """1/3 sum over phi in {Q, K, V} of the relation divergence between teacher and student, summed over rows.

    The teacher's phi are the queries, keys and values of its last attention layer, before positions are encoded. The
    student's phi are three learned maps (no bias) of its final hidden state. The maps are discarded after training. So
    the student's own projections may have any width, and none of its layers must resemble a teacher's layer. Relations
    are between the supervised rows of one document; across tokenizers, between the rows of the batch's aligned pairs.

    Source: Wang et al., MiniLMv2 (arXiv:2012.15828); the learned maps are those of MiniMoE's students
    (arXiv:2305.12129). Departs from both as in `ops.relation`; also, rows without supervision, such as prompts, have no
    relations.

    Raises: UsageError if the number of heads is below 1 or does not divide every width.
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
        """One term with weight 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The student's rows; the teacher's queries, keys and values."""
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
    """The largest number of heads up to `max_heads` that divides every width."""
    common_divisor = gcd(*widths.values())
    return max(heads for heads in range(1, max_heads + 1) if common_divisor % heads == 0)


def relations_cost(inputs: CostInputs) -> ObjectiveCost:
    """Three maps with both gradients; the relations of each row to its document, in both models."""
    relation_width = sum(inputs.teacher.layers[-1].mixer.projection_widths().values())
    document_rows = inputs.document_rows * inputs.aligned_rows / inputs.rows
    return ObjectiveCost(
        other_operations=inputs.aligned_rows * relation_width * (6.0 * inputs.student.hidden + 8.0 * document_rows),
        weights=inputs.student.hidden * relation_width,
    )


@register_objective(
    "relations",
    help="How rows relate in the teacher's last attention layer, in up to `heads` heads (MiniLM).",
    cost=relations_cost,
    supports_cross_tokenizer=True,
    numeric_options={"heads": 32.0},
)
def build_relations(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`AttentionRelations` with as many heads as divide the teacher's widths."""
    widths = pair.teacher.relation_widths
    return AttentionRelations(
        pair.student.hidden_size, widths, heads=find_num_heads(widths, options.get_positive_int("heads"))
    )
