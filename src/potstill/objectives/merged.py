"""Two tokenisations compared by the text that runs of their tokens stand for (the idea behind GOLD)."""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.core.types import GROUPS, Batch, Needs, Signals, Terms, supervised, view
from potstill.objectives import rows
from potstill.objectives.bridge import each
from potstill.ops import fused
from potstill.ops.coarse import Coarse
from potstill.ops.divergence import Divergence, cross_entropy, forward_kl, log_partition
from potstill.ops.likelihood import binary_kl_with_slope, grouped
from potstill.ops.row_loss import DivergenceRows, Kept, Tangent

AT_ONCE = 128  # rows whose logits are held


class Sorted(NamedTuple):
    """`tokens` are the rows of student and teacher that one shared token stands for; `runs` all other groups' rows.

    `run[g]` says which of the groups are those others, `first[g]` the student's first row of each group.
    """

    tokens: tuple[Int[Tensor, " P"], Int[Tensor, " P"]]
    runs: tuple[Int[Tensor, " R"], Int[Tensor, " Q"]]
    run: Tensor
    first: Tensor


class Merged(rows.OverRows):
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
        shared: Int[Tensor, "2 S"],
        vocabularies: tuple[int, int],
        *,
        divergence: Divergence = forward_kl,
        temperature: float = 1.0,
        teacher: str = "teacher",
        name: str = "spans",
    ) -> None:
        self.shared, self.vocabularies = shared, vocabularies
        self.divergence, self.temperature, self.teacher, self.name = divergence, temperature, teacher, name
        self.known = torch.full((vocabularies[1],), -1)
        self.known[shared[1]] = shared[0]

    @property
    def weights(self) -> Mapping[str, float]:
        """Both kinds of group, each weighing 1."""
        return {f"{self.name}_tokens": 1.0, f"{self.name}_runs": 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """Each network's own supervised rows."""
        return each(batch, self.teacher)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of groups of either kind, for both terms: their sum is a mean over groups."""
        found = self.sorted_out(batch)
        return dict.fromkeys(self.weights, len(found.tokens[0]) + int(found.run.sum()))

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, rows.RowTerm], Terms]:
        """Both kinds of group as sums over the student's rows."""
        found, teacher, n = self.sorted_out(batch), frozen[self.teacher], len(supervised(batch)[1])
        ours, theirs = found.tokens
        partner = rows.spread(theirs, ours, n, -1)
        tokens, runs, kept = f"{self.name}_told", f"{self.name}_tangent", f"{self.name}_kept"
        tangent = self.tangent(found, views["student"], teacher, batch)
        loss = DivergenceRows(self.divergence, temperature=self.temperature, teacher=tokens)
        said: dict[str, rows.Telling] = {
            tokens: lambda a, b: self.coarse(teacher, partner[a:b]),
            kept: lambda a, b: partner[a:b] >= 0,
        }
        return {
            f"{self.name}_tokens": rows.RowTerm(Kept(loss, kept), said),
            f"{self.name}_runs": rows.RowTerm(Tangent(runs), {runs: lambda a, b: tangent[a:b]}),
        }, {}

    def sorted_out(self, batch: Batch) -> Sorted:
        """Which groups are of which kind."""
        sides = [_side(batch, name, key) for name, key in zip(("student", self.teacher), GROUPS, strict=True)]
        total = 1 + max((int(group.max()) for group, _ in sides if len(group)), default=0)
        total = max(total, 1)  # where no row has a group, one that is empty
        sizes = torch.stack([_sizes(group, total) for group, _ in sides])
        first, other = (_first(group, total) for group, _ in sides)
        alone = (sizes == 1).all(0).nonzero()[:, 0]
        ours, theirs = first[alone], other[alone]
        known = self.known.to(theirs.device)
        same = known[sides[1][1][theirs]] == sides[0][1][ours]
        run = (sizes > 0).all(0)
        run[alone[same]] = False
        runs = tuple((run[group.clamp(min=0)] & (group >= 0)).nonzero()[:, 0] for group, _ in sides)
        return Sorted((ours[same], theirs[same]), (runs[0], runs[1]), run, first)

    @torch.no_grad()
    def tangent(self, found: Sorted, student: Signals, teacher: Signals, batch: Batch) -> Float[Tensor, "N 3"]:
        """What `Tangent` is told of d(P, Q)."""
        sides = zip(("student", self.teacher), GROUPS, strict=True)
        (ours, targets), (theirs, labels) = (_side(batch, name, key) for name, key in sides)
        mine, yours = found.runs
        log_q, log_p = log_likelihoods(student, mine, targets[mine]), log_likelihoods(teacher, yours, labels[yours])
        total = len(found.run)
        both = grouped(log_p, theirs[yours], total), grouped(log_q, ours[mine], total)
        value, slope = binary_kl_with_slope(both[0].to(log_q.dtype), both[1])
        told = log_q.new_zeros(len(targets), 3)
        told[found.first[found.run], 0] = value[found.run]
        told[mine, 1] = slope[ours[mine]]
        told[mine, 2] = log_q
        return told

    @torch.no_grad()
    def coarse(self, teacher: Signals, partner: Int[Tensor, " C"]) -> Coarse:
        """The partners' rows over the shared tokens, at the temperature; a row without one says nothing."""
        ours, theirs = (ids.to(partner.device) for ids in self.shared)
        known = (partner >= 0).nonzero()[:, 0]
        parts = [self._merged(logits, theirs) for logits, _ in _few(teacher, partner[known])]
        wide = parts[0][0].dtype if parts else torch.float32
        log_p, log_rest = (torch.zeros(len(partner), n, dtype=wide, device=partner.device) for n in (len(ours), 1))
        if parts:
            log_p[known], log_rest[known] = (torch.cat(side) for side in zip(*parts, strict=True))
        members = torch.ones(self.vocabularies[0], 1, dtype=wide, device=partner.device)
        return Coarse(ours.expand(len(partner), -1), log_p, log_rest, members)

    def _merged(self, logits: Float[Tensor, "C V"], theirs: Int[Tensor, " S"]) -> tuple[Tensor, Tensor]:
        """(log p of the shared tokens, log p of all others); nothing for others where the student has none."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if self.temperature == 1 else logits / self.temperature
        p, known = logits.softmax(-1), logits.gather(-1, theirs.expand(len(logits), -1))
        known.sub_(log_partition(logits, p)[:, None]).clamp_min_(math.log(torch.finfo(p.dtype).tiny))
        if self.shared.shape[1] == self.vocabularies[0]:
            return known.log_softmax(-1), known.new_full((len(known), 1), -torch.inf)
        others = p.index_fill_(-1, theirs, 0.0).sum(-1, keepdim=True)
        return known, others.clamp_min_(torch.finfo(p.dtype).tiny).log_()


def log_likelihoods(signals: Signals, numbers: Int[Tensor, " R"], targets: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """log p(target) at the rows of these numbers."""
    found = [-cross_entropy(logits, targets[own]) for logits, own in _few(signals, numbers)]
    return torch.cat([torch.zeros(0, device=numbers.device), *found])


def _few(signals: Signals, numbers: Int[Tensor, " R"]) -> Iterator[tuple[Float[Tensor, "C V"], slice]]:
    """The logits of the rows of these numbers, few at a time and in order, and which of the numbers they belong to."""
    for start in range(0, len(numbers), AT_ONCE):
        logits = signals.logits(signals.rows[numbers[start : start + AT_ONCE]])
        for block in fused.blocks(logits):
            few, first = logits[block], start + block.start
            yield few, slice(first, first + len(few))


def _side(batch: Batch, name: str, key: str) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """The group and the target of each row."""
    targets = supervised(view(batch, name))[1]
    return batch.get(key, torch.arange(len(targets), device=targets.device)), targets


def _sizes(group: Int[Tensor, " N"], total: int) -> Int[Tensor, " G"]:
    return torch.bincount(group[group >= 0], minlength=total)


def _first(group: Int[Tensor, " N"], total: int) -> Int[Tensor, " G"]:
    """The first row of each group."""
    numbered = (group >= 0).nonzero()[:, 0]
    return group.new_zeros(total).scatter_reduce(0, group[numbered], numbered, "amin", include_self=False)
