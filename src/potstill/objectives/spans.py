"""Two tokenisations compared by the text that runs of their tokens stand for (the idea behind GOLD)."""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.core.types import ALIGNED_GROUPS, Batch, Needs, Signals, Terms, get_view, supervised_positions
from potstill.objectives import row_terms
from potstill.objectives.row_matching import make_row_needs
from potstill.ops import fused
from potstill.ops.coarse import CoarseDistribution
from potstill.ops.divergence import Divergence, cross_entropy, forward_kl, log_partition
from potstill.ops.likelihood import binary_kl_with_slope, sum_groups
from potstill.ops.row_loss import DivergenceRows, Masked, Tangent

ROWS_PER_CHUNK = 128  # rows whose logits are held


class SpanGroups(NamedTuple):
    """`tokens` are the rows of student and teacher that one shared token stands for; `runs` all other groups' rows.

    `run[g]` says which of the groups are those others, `first[g]` the student's first row of each group.
    """

    token_rows: tuple[Int[Tensor, " P"], Int[Tensor, " P"]]
    run_rows: tuple[Int[Tensor, " R"], Int[Tensor, " Q"]]
    is_run: Tensor
    first_rows: Tensor


class Spans(row_terms.RowObjectiveMixin):
    """sum over groups of tau^2 D(p~ || q~) where one shared token stands for the group, of d(P, Q) where a run does.

    p~ and q~ are the distributions over the tokens that both vocabularies have (`shared [2 S]`, the student's ids and
    the teacher's), everything else by its mass (`ops.coarse`). P and Q are the probabilities of the group's own tokens,
    one after the other, d their binary divergence (`ops.likelihood`). Of a run no distribution is needed but only the
    log-probabilities of its tokens: the student's rows in runs are read once more, without gradient.

    The batch's `GROUPS` give each supervised row of either side the number of the group that the token it predicts is
    part of (`ops.align.merged` over the tokens with labels), ascending over the whole batch, -1 for none; a group with
    a token that is not supervised on either side has none. Without them each row is its own group.

    Source: TRL's GOLDTrainer, whose groups (cuts that both tokenisations have) and chain rule over a group's own tokens
    are these. Departs from it: there a whole distribution is multiplied by the probabilities of a group's other tokens,
    which is none any more, and what is not shared is compared by sorting.
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
        """Both kinds of group, each weighing 1."""
        return {f"{self.name}_tokens": 1.0, f"{self.name}_runs": 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """Each network's own supervised rows."""
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
        teacher_key, tangent_key, mask_key = f"{self.name}_told", f"{self.name}_tangent", f"{self.name}_kept"
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
        """Which groups are of which kind."""
        groups_and_targets = [
            _get_groups_and_targets(batch, name, key)
            for name, key in zip(("student", self.teacher), ALIGNED_GROUPS, strict=True)
        ]
        num_groups = 1 + max((int(group.max()) for group, _ in groups_and_targets if len(group)), default=0)
        num_groups = max(num_groups, 1)  # where no row has a group, one that is empty
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
        """What `Tangent` is told of d(P, Q)."""
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
        """The partners' rows over the shared tokens, at the temperature; a row without one says nothing."""
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
        """(log p of the shared tokens, log p of all others); nothing for others where the student has none."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
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
    """log p(target) at the rows of these numbers."""
    parts = [-cross_entropy(logits, targets[span]) for logits, span in _iterate_logits(signals, row_indices)]
    return torch.cat([torch.zeros(0, device=row_indices.device), *parts])


def _iterate_logits(signals: Signals, row_indices: Int[Tensor, " R"]) -> Iterator[tuple[Float[Tensor, "C V"], slice]]:
    """The logits of the rows of these numbers, few at a time and in order, and which of the numbers they belong to."""
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
