"""The teacher's distributions mapped to the student's vocabulary by minimum edit distance of spelling (MinED)."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from potstill.core.types import (
    EDIT_ALIGNED_PAIRS,
    Batch,
    Needs,
    Objective,
    Signals,
    Terms,
    get_view,
    gold_mask,
    supervised_positions,
)
from potstill.objectives import row_terms
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.row_matching import make_row_needs, match_aligned_rows
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.layout import apply_padded
from potstill.ops.row_loss import DivergenceRows, Masked

MIN_LOGIT = -1e5  # finite, so that 0 times it is 0, and low enough for a probability of 0 in every dtype


class MinED(row_terms.RowObjectiveMixin):
    """sum over the student's rows of tau^2 KL(p' || q), with p' the teacher's row in the student's vocabulary.

    `nearest_ids [V_t]` maps each of the teacher's ids to the student's id with the most similar spelling, -1 if none is
    similar (`models.tokenizers.nearest_tokens`). If several of the teacher's ids map to one of the student's, the first
    counts. At an aligned row, p' is the softmax over the student's ids that have a counterpart. At every other row, p'
    is 1 at the text's next token.

    The batch key `aligned.warped [2 P]` pairs rows of both models. On the dynamic time warping path through their own
    tokens (`ops.edit_distance.dtw_path`, the teacher first, spaces stripped) the student's row has only this row of the
    teacher (`find_single_matches`). The numbers are indices of the supervised rows of each model. Without the key each
    row pairs with itself. A pair is aligned if `nearest_ids` maps the teacher's own token to the student's.

    Source: Wan et al. (arXiv:2401.10491), as in the baseline of DSKD's code. Departs from that code: a bound on the
    edit distance, over bytes (`models.tokenizers.nearest_tokens`); tau^2, which the code leaves out.
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
        """One term with weight 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The supervised rows of both models."""
        return make_row_needs(batch, self.teacher)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of the student's supervised rows; in a rollout, of those with an aligned row of the teacher."""
        return {self.name: int(self._find_trained_rows(batch, self.find_partners(batch)).sum())}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """tau^2 KL(p' || q) of each row."""
        teacher, targets, teacher_key = frozen[self.teacher], supervised_positions(batch)[1], f"{self.name}_teacher"
        partner = self.find_partners(batch)
        logits_fn = make_student_vocab_logits_fn(self.source_ids.to(partner.device), teacher)

        def get_teacher_rows(start: int, stop: int) -> Float[Tensor, "C V"]:
            return compute_teacher_rows(logits_fn, teacher.rows, partner[start:stop], targets[start:stop])

        loss, mask_key = DivergenceRows(temperature=self.temperature, teacher=teacher_key), f"{self.name}_mask"
        row_mask = self._find_trained_rows(batch, partner)
        return {
            self.name: row_terms.RowTerm(
                Masked(loss, mask_key), {teacher_key: get_teacher_rows, mask_key: lambda a, b: row_mask[a:b]}
            )
        }, {}

    def _find_trained_rows(self, batch: Batch, partner: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """The rows with a target: an aligned row of the teacher, or a token of the data."""
        return gold_mask(batch) | (partner >= 0)

    def find_partners(self, batch: Batch) -> Int[Tensor, " N"]:
        """For each of the student's rows the aligned row of the teacher, -1 if there is none."""
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
    """For each of the student's ids the first of the teacher's ids that maps to it, -1 if none does."""
    teacher_ids = (nearest_ids >= 0).nonzero()[:, 0]
    no_teacher_ids = torch.full((vocabulary,), len(nearest_ids), device=nearest_ids.device)
    first_teacher_ids = no_teacher_ids.scatter_reduce(0, nearest_ids[teacher_ids], teacher_ids, "amin")
    return first_teacher_ids.masked_fill(first_teacher_ids == len(nearest_ids), -1)


def make_student_vocab_logits_fn(source_ids: Int[Tensor, " V_s"], teacher: Signals) -> Callable[[Tensor], Tensor]:
    """A function that gives the teacher's logits for the student's ids, from their rows of a known head only."""
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
    """The partner's logits over the student's ids; without a partner, logits with probability 1 at the target."""
    has_partner: Bool[Tensor, " C"] = partner >= 0
    partner_logits = logits_fn(states[partner[has_partner]])
    row_logits = partner_logits.new_full((len(partner), partner_logits.shape[1]), MIN_LOGIT)
    row_logits[has_partner] = partner_logits
    unpaired_rows = (~has_partner).nonzero()[:, 0]
    row_logits[unpaired_rows, targets[unpaired_rows]] = 0
    return row_logits


def _get_row_tokens(batch: Batch) -> Int[Tensor, " N"]:
    """The input token at each row."""
    return batch["input_ids"][supervised_positions(batch)[0]]


def mined_cost(inputs: CostInputs) -> ObjectiveCost:
    """The teacher's logits at the pairs, for the student's ids only, through a copy of these rows of its head."""
    head_entries = inputs.vocabularies[0] * inputs.widths[1]
    return ObjectiveCost(
        other_operations=2.0 * head_entries * inputs.aligned_rows,
        logit_copies=(2, 0),
        held_bytes=float(inputs.compute_bytes * head_entries),
    )


@register_objective(
    "mined",
    help="The teacher's distribution, mapped to the tokens with the most similar spelling (MinED).",
    cost=mined_cost,
    supports_cross_tokenizer=True,
    needs_edit_alignment=True,
)
def build_mined(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`MinED` between the vocabularies of the pair."""
    return MinED(pair.nearest_ids, pair.vocab_sizes[0], temperature=options.temperature, name=options.name)
