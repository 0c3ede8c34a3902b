"""The teacher's distributions brought into the student's vocabulary by likeness of spelling (MinED)."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from potstill.core.types import (
    EDIT_ALIGNED_PAIRS,
    Batch,
    Needs,
    Signals,
    Terms,
    get_view,
    gold_mask,
    supervised_positions,
)
from potstill.objectives import row_terms
from potstill.objectives.row_matching import make_row_needs, match_aligned_rows
from potstill.ops.layout import apply_padded
from potstill.ops.row_loss import DivergenceRows, Masked

MIN_LOGIT = -1e5  # a logit so low that its probability is 0 in any dtype, and 0 times it is 0


class MinED(row_terms.RowObjectiveMixin):
    """sum over the student's rows of tau^2 KL(p' || q), with p' the teacher's row in the student's vocabulary.

    `nearest [V_t]` names the student's id that is written most like each of the teacher's, -1 where none is
    (`models.nearest`). Of several of the teacher's ids for one of the student's the first counts. At a row that is
    aligned, p' is softmax over the student's ids that have one; at every other it is all at the text's next token.

    The batch key `warped [2 P]` pairs a row of the student with the row of the teacher that the cheapest path through
    their own tokens (`ops.edit.warped`, the teacher first, spaces stripped) gives it, where that gives one alone
    (`ops.edit.alone`); rows count the supervised ones of each side, as in `pairs`. Without the key each row is paired
    with itself. A pair is aligned where `nearest` takes the teacher's own token to the student's.

    Source: Wan et al. (arXiv:2401.10491), as the baseline of DSKD's code. Departs from that code: likeness is bounded
    (`models.nearest`), over bytes; tau^2, which there is left out.
    """

    additive: ClassVar[bool] = True

    def __init__(
        self,
        nearest_ids: Int[Tensor, " V_t"],
        vocabulary: int,
        *,
        temperature: float = 1.0,
        teacher: str = "teacher",
        name: str = "mined",
    ) -> None:
        self.nearest_ids, self.source_ids = nearest_ids, invert_nearest_ids(nearest_ids, vocabulary)
        self.temperature, self.teacher, self.name = temperature, teacher, name

    @property
    def weights(self) -> Mapping[str, float]:
        """The one term, weighing 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """Each network's own supervised rows."""
        return make_row_needs(batch, self.teacher)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The student's supervised rows, of a rollout those with a row to learn from."""
        return {self.name: int(self._find_trained_rows(batch, self.find_partners(batch)).sum())}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """tau^2 KL(p' || q) of each row."""
        teacher, targets, teacher_key = frozen[self.teacher], supervised_positions(batch)[1], f"{self.name}_told"
        partner = self.find_partners(batch)
        logits_fn = make_student_vocab_logits_fn(self.source_ids.to(partner.device), teacher)

        def get_teacher_rows(start: int, stop: int) -> Float[Tensor, "C V"]:
            return compute_teacher_rows(logits_fn, teacher.rows, partner[start:stop], targets[start:stop])

        loss, mask_key = DivergenceRows(temperature=self.temperature, teacher=teacher_key), f"{self.name}_kept"
        row_mask = self._find_trained_rows(batch, partner)
        return {
            self.name: row_terms.RowTerm(
                Masked(loss, mask_key), {teacher_key: get_teacher_rows, mask_key: lambda a, b: row_mask[a:b]}
            )
        }, {}

    def _find_trained_rows(self, batch: Batch, partner: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Where there is something to learn from: a row of the teacher, or a token that the student did not write."""
        return gold_mask(batch) | (partner >= 0)

    def find_partners(self, batch: Batch) -> Int[Tensor, " N"]:
        """For each of the student's rows the teacher's that it learns from, -1 where none is aligned with it."""
        row_tokens = {name: _get_row_tokens(get_view(batch, name)) for name in ("student", self.teacher)}
        student_rows, teacher_rows = match_aligned_rows(batch, EDIT_ALIGNED_PAIRS)
        is_same_token = (
            self.nearest_ids.to(teacher_rows.device)[row_tokens[self.teacher][teacher_rows]]
            == row_tokens["student"][student_rows]
        )
        return row_terms.scatter_rows(
            teacher_rows.masked_fill(~is_same_token, -1), student_rows, len(row_tokens["student"]), -1
        )


def invert_nearest_ids(nearest_ids: Int[Tensor, " V_t"], vocabulary: int) -> Int[Tensor, " V_s"]:
    """For each of the student's ids the first of the teacher's that is nearest to it, -1 where none is."""
    teacher_ids = (nearest_ids >= 0).nonzero()[:, 0]
    no_teacher_ids = torch.full((vocabulary,), len(nearest_ids), device=nearest_ids.device)
    first_teacher_ids = no_teacher_ids.scatter_reduce(0, nearest_ids[teacher_ids], teacher_ids, "amin")
    return first_teacher_ids.masked_fill(first_teacher_ids == len(nearest_ids), -1)


def make_student_vocab_logits_fn(source_ids: Int[Tensor, " V_s"], teacher: Signals) -> Callable[[Tensor], Tensor]:
    """What gives the teacher's logits for the student's ids, by those rows of its head alone where it can be read."""
    columns, is_missing = source_ids.clamp(min=0), source_ids < 0
    if teacher.head is None:
        return lambda states: teacher.logits(states)[:, columns].masked_fill_(is_missing, MIN_LOGIT)
    full_head = row_terms.get_frozen_head(teacher, "teacher")
    head = full_head._replace(
        weight=full_head.weight[columns], bias=None if full_head.bias is None else full_head.bias[columns]
    )
    return lambda states: apply_padded(head.logits, states).masked_fill_(is_missing, MIN_LOGIT)


def compute_teacher_rows(
    logits_fn: Callable[[Tensor], Tensor],
    states: Float[Tensor, "M D"],
    partner: Int[Tensor, " C"],
    targets: Int[Tensor, " C"],
) -> Float[Tensor, "C V"]:
    """`logits` of the partner's states, over the student's ids; where there is no partner, certain of the target."""
    has_partner: Bool[Tensor, " C"] = partner >= 0
    partner_logits = logits_fn(states[partner[has_partner]])
    row_logits = partner_logits.new_full((len(partner), partner_logits.shape[1]), MIN_LOGIT)
    row_logits[has_partner] = partner_logits
    unpaired_rows = (~has_partner).nonzero()[:, 0]
    row_logits[unpaired_rows, targets[unpaired_rows]] = 0
    return row_logits


def _get_row_tokens(batch: Batch) -> Int[Tensor, " N"]:
    """The token that each row is the last to have read."""
    return batch["input_ids"][supervised_positions(batch)[0]]
