"""Compares two tokenizations span by span: groups of tokens that cover the same bytes (as in TRL's GOLD)."""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.core.types import ALIGNED_GROUPS, Batch, Needs, Objective, Signals, Terms, get_view, supervised_positions
from potstill.objectives import row_terms
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.row_matching import make_row_needs
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops import fused
from potstill.ops.coarse import CoarseDistribution
from potstill.ops.divergence import Divergence, cross_entropy, forward_kl
from potstill.ops.divergence_gradient import log_partition
from potstill.ops.likelihood import binary_kl_with_slope, sum_groups
from potstill.ops.precision import upcast
from potstill.ops.row_loss import DivergenceRows, Masked, Tangent

ROWS_PER_CHUNK = 128  # rows whose logits are alive at once


class SpanGroups(NamedTuple):
    """The groups of a batch in two kinds: one shared token on both sides, and runs, which are all others.

    Attributes:
        token_rows: the rows of student and teacher in groups of the first kind.
        run_rows: the rows of student and teacher in runs.
        is_run: whether each group is a run.
        first_rows: the student's first row of each group.
    """

    token_rows: tuple[Int[Tensor, " P"], Int[Tensor, " P"]]
    run_rows: tuple[Int[Tensor, " R"], Int[Tensor, " Q"]]
    is_run: Tensor
    first_rows: Tensor


class Spans(row_terms.RowObjectiveMixin):
    """sum over groups of tau^2 D(p~ || q~) if both sides are the same single token, else (in a run) of d(P, Q).

    p~ and q~ are distributions over the tokens of both vocabularies (`shared_token_ids [2 S]`, the student's ids and
    the teacher's); all other tokens count by their total probability (`ops.coarse`). P and Q are the products of the
    probabilities of the group's own tokens, and d is their binary KL (`ops.likelihood`). A run needs only the
    log-probabilities of its tokens. So it computes the student's rows in runs once more, without gradient.

    The batch's `ALIGNED_GROUPS` number the group of the token that each supervised row predicts
    (`ops.align.merge_spans` over the tokens with labels), ascending over the whole batch, -1 for none. A group with an
    unsupervised token on either side has no number. Without these keys each row is its own group.

    Source: TRL's GOLDTrainer has the same groups (cuts that both tokenizations share) and the same chain rule over the
    tokens of a group. Departs from it: GOLD multiplies a whole distribution by the probabilities of a group's other
    tokens, which does not give a distribution. It compares tokens that are not shared by sorting.
    """

    additive: ClassVar[bool] = True

    def __init__(
        self,
        shared_token_ids: Int[Tensor, "2 S"],
        vocab_sizes: tuple[int, int],
        *,
        divergence: Divergence = forward_kl,
        temperature: float = 1.0,
        teacher: str = "teacher",
        name: str = "spans",
    ) -> None:
        self.shared_token_ids, self.vocab_sizes = shared_token_ids, vocab_sizes
        self.divergence, self.temperature, self.teacher, self.name = divergence, temperature, teacher, name
        self.id_map = torch.full((vocab_sizes[1],), -1)
        self.id_map[shared_token_ids[1]] = shared_token_ids[0]

    @property
    def weights(self) -> Mapping[str, float]:
        """One term for each kind of group, both with weight 1."""
        return {f"{self.name}_tokens": 1.0, f"{self.name}_runs": 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The supervised rows of both models."""
        return make_row_needs(batch, self.teacher)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of groups of either kind, for both terms: their sum is a mean over groups."""
        groups = self.classify_groups(batch)
        return dict.fromkeys(self.weights, len(groups.token_rows[0]) + int(groups.is_run.sum()))

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """Both kinds of group as sums over the student's rows."""
        groups, teacher, n = self.classify_groups(batch), frozen[self.teacher], len(supervised_positions(batch)[1])
        student_rows, teacher_rows = groups.token_rows
        partner = row_terms.scatter_rows(teacher_rows, student_rows, n, -1)
        teacher_key, tangent_key, mask_key = f"{self.name}_teacher", f"{self.name}_tangent", f"{self.name}_mask"
        tangent = self.compute_tangent(groups, views["student"], teacher, batch)
        loss = DivergenceRows(self.divergence, temperature=self.temperature, teacher=teacher_key)
        inputs: dict[str, row_terms.RowInputFn] = {
            teacher_key: lambda a, b: self.coarsen_rows(teacher, partner[a:b]),
            mask_key: lambda a, b: partner[a:b] >= 0,
        }
        return {
            f"{self.name}_tokens": row_terms.RowTerm(Masked(loss, mask_key), inputs),
            f"{self.name}_runs": row_terms.RowTerm(Tangent(tangent_key), {tangent_key: lambda a, b: tangent[a:b]}),
        }, {}

    def classify_groups(self, batch: Batch) -> SpanGroups:
        """The groups of the batch, by kind."""
        groups_and_targets = [
            _get_groups_and_targets(batch, name, key)
            for name, key in zip(("student", self.teacher), ALIGNED_GROUPS, strict=True)
        ]
        num_groups = 1 + max((int(group.max()) for group, _ in groups_and_targets if len(group)), default=0)
        num_groups = max(num_groups, 1)  # without any group, one empty group
        sizes = torch.stack([_count_group_rows(group, num_groups) for group, _ in groups_and_targets])
        student_first_rows, teacher_first_rows = (
            _find_first_rows(group, num_groups) for group, _ in groups_and_targets
        )
        single_row_groups = (sizes == 1).all(0).nonzero()[:, 0]
        student_rows, teacher_rows = student_first_rows[single_row_groups], teacher_first_rows[single_row_groups]
        id_map = self.id_map.to(teacher_rows.device)
        is_same_token = id_map[groups_and_targets[1][1][teacher_rows]] == groups_and_targets[0][1][student_rows]
        is_run = (sizes > 0).all(0)
        is_run[single_row_groups[is_same_token]] = False
        run_rows = tuple((is_run[group.clamp(min=0)] & (group >= 0)).nonzero()[:, 0] for group, _ in groups_and_targets)
        return SpanGroups(
            (student_rows[is_same_token], teacher_rows[is_same_token]),
            (run_rows[0], run_rows[1]),
            is_run,
            student_first_rows,
        )

    @torch.no_grad()
    def compute_tangent(
        self, groups: SpanGroups, student: Signals, teacher: Signals, batch: Batch
    ) -> Float[Tensor, "N 3"]:
        """Value, slope and point of d(P, Q) at each of the student's rows, as `Tangent` reads them."""
        names_and_keys = zip(("student", self.teacher), ALIGNED_GROUPS, strict=True)
        (student_groups, targets), (teacher_groups, labels) = (
            _get_groups_and_targets(batch, name, key) for name, key in names_and_keys
        )
        student_rows, teacher_rows = groups.run_rows
        log_q, log_p = (
            compute_log_likelihoods(student, student_rows, targets[student_rows]),
            compute_log_likelihoods(teacher, teacher_rows, labels[teacher_rows]),
        )
        num_groups = len(groups.is_run)
        group_log_probs = (
            sum_groups(log_p, teacher_groups[teacher_rows], num_groups),
            sum_groups(log_q, student_groups[student_rows], num_groups),
        )
        value, slope = binary_kl_with_slope(group_log_probs[0].to(log_q.dtype), group_log_probs[1])
        tangent = log_q.new_zeros(len(targets), 3)
        tangent[groups.first_rows[groups.is_run], 0] = value[groups.is_run]
        tangent[student_rows, 1] = slope[student_groups[student_rows]]
        tangent[student_rows, 2] = log_q
        return tangent

    @torch.no_grad()
    def coarsen_rows(self, teacher: Signals, partner: Int[Tensor, " C"]) -> CoarseDistribution:
        """The partners' distributions over the shared tokens, at the temperature; zeros for a row without a partner."""
        student_ids, teacher_ids = (ids.to(partner.device) for ids in self.shared_token_ids)
        paired_rows = (partner >= 0).nonzero()[:, 0]
        parts = [
            self._coarsen_logits(logits, teacher_ids) for logits, _ in _iterate_logits(teacher, partner[paired_rows])
        ]
        dtype = parts[0][0].dtype if parts else torch.float32
        log_p, log_rest = (
            torch.zeros(len(partner), n, dtype=dtype, device=partner.device) for n in (len(student_ids), 1)
        )
        if parts:
            log_p[paired_rows], log_rest[paired_rows] = (torch.cat(columns) for columns in zip(*parts, strict=True))
        members = torch.ones(self.vocab_sizes[0], 1, dtype=dtype, device=partner.device)
        return CoarseDistribution(student_ids.expand(len(partner), -1), log_p, log_rest, members)

    def _coarsen_logits(self, logits: Float[Tensor, "C V"], teacher_ids: Int[Tensor, " S"]) -> tuple[Tensor, Tensor]:
        """(log p of the shared tokens, log p of all others); -inf for others if the student has no others."""
        logits = upcast(logits)
        logits = logits if self.temperature == 1 else logits / self.temperature
        p, shared_log_probs = logits.softmax(-1), logits.gather(-1, teacher_ids.expand(len(logits), -1))
        shared_log_probs.sub_(log_partition(logits, p)[:, None]).clamp_min_(math.log(torch.finfo(p.dtype).tiny))
        if self.shared_token_ids.shape[1] == self.vocab_sizes[0]:
            return shared_log_probs.log_softmax(-1), shared_log_probs.new_full((len(shared_log_probs), 1), -torch.inf)
        other_probs = p.index_fill_(-1, teacher_ids, 0.0).sum(-1, keepdim=True)
        return shared_log_probs, other_probs.clamp_min_(torch.finfo(p.dtype).tiny).log_()


def compute_log_likelihoods(
    signals: Signals, row_indices: Int[Tensor, " R"], targets: Int[Tensor, " R"]
) -> Float[Tensor, " R"]:
    """log p(target) at the rows of these indices."""
    parts = [-cross_entropy(logits, targets[span]) for logits, span in _iterate_logits(signals, row_indices)]
    return torch.cat([torch.zeros(0, device=row_indices.device), *parts])


def _iterate_logits(signals: Signals, row_indices: Int[Tensor, " R"]) -> Iterator[tuple[Float[Tensor, "C V"], slice]]:
    """The logits of the rows of these indices, few at a time and in order, each with its slice of the indices."""
    for start in range(0, len(row_indices), ROWS_PER_CHUNK):
        logits = signals.logits(signals.rows[row_indices[start : start + ROWS_PER_CHUNK]])
        for block in fused.split_rows(logits):
            chunk, first = logits[block], start + block.start
            yield chunk, slice(first, first + len(chunk))


def _get_groups_and_targets(batch: Batch, name: str, key: str) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """The group and the target of each row."""
    targets = supervised_positions(get_view(batch, name))[1]
    return batch.get(key, torch.arange(len(targets), device=targets.device)), targets


def _count_group_rows(group: Int[Tensor, " N"], num_groups: int) -> Int[Tensor, " G"]:
    return torch.bincount(group[group >= 0], minlength=num_groups)


def _find_first_rows(group: Int[Tensor, " N"], num_groups: int) -> Int[Tensor, " G"]:
    """The first row of each group."""
    grouped_rows = (group >= 0).nonzero()[:, 0]
    return group.new_zeros(num_groups).scatter_reduce(0, group[grouped_rows], grouped_rows, "amin", include_self=False)


def spans_cost(inputs: CostInputs) -> ObjectiveCost:
    """The teacher's logits of every row, and the student's logits of rows in runs a second time."""
    return ObjectiveCost(
        student_products=inputs.rows - inputs.aligned_rows, teacher_products=inputs.teacher_rows, logit_copies=(2, 1)
    )


@register_objective(
    "spans",
    help="Distributions over shared tokens, and likelihoods of runs of tokens that cover the same text.",
    cost=spans_cost,
    takes_divergence=True,
    supports_cross_tokenizer=True,
)
def build_spans(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`Spans` between the vocabularies of the pair."""
    return Spans(
        pair.shared_token_ids,
        pair.vocab_sizes,
        divergence=options.divergence,
        temperature=options.temperature,
        name=options.name,
    )
