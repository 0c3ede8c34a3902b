"""One loss for the sizes of an elastic student: the mean of an objective over the sizes that a step trains."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from potstill.core.elastic import STUDENT, format_share, name_student
from potstill.core.types import DIVISOR, STEP, Batch, Needs, Objective, Signals, Terms
from potstill.objectives.row_terms import get_head

SIZES_PER_STEP = 4  # by default: the largest, the smallest and 2 others, as in the paper of the sandwich rule


class ElasticObjective(nn.Module):
    """sum_s L(student of size s) / n over the n sizes of a step: the largest, the smallest, and n - 2 random ones.

    That is the sandwich rule of Universally Slimmable Networks (arXiv:1903.05134). L is `objective`, whose terms get
    the names `TERM@SHARE`. `shares` are the sizes, the largest first. The seed and the number of the step draw the
    sizes. So all passes and ranks of a step, and a resumed run, train the same ones. Outside of training every size
    counts.

    With `from_largest` the smaller sizes learn from the detached largest one instead of the teachers (inplace
    distillation, same paper); the largest learns from the teachers.
    """

    def __init__(
        self, objective: Objective, shares: Sequence[float], *, sizes_per_step: int, from_largest: bool, seed: int
    ) -> None:
        super().__init__()
        self.objective, self.shares, self.seed, self.from_largest = objective, tuple(shares), seed, from_largest
        self.num_sizes = min(sizes_per_step, len(shares))

    @property
    def additive(self) -> bool:
        """Whether the objective is a sum over rows."""
        return self.objective.additive

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each term for each size, divided by the sizes of a step."""
        weights = self.objective.weights.items()
        return {_name_term(name, share): weight / self.num_sizes for share in self.shares for name, weight in weights}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """What the objective needs of each drawn size in place of the student, and of the teachers."""
        needs = dict(self.objective.needs(batch))
        student = needs.pop(STUDENT)
        return {**{name_student(share): student for share in self.draw_sizes(batch)}, **needs}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The counts of the objective for each drawn size, and 0 for the others."""
        counts, sample = self.objective.counts(batch).items(), self.draw_sizes(batch)
        return {
            _name_term(name, share): count if share in sample else 0 for share in self.shares for name, count in counts
        }

    def forward(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """The terms of every size; those of sizes that are not drawn are 0."""
        largest = views[name_student(self.shares[0])]
        terms = {name: largest.rows.new_zeros((), dtype=torch.float32) for name in self.weights}
        for share in self.draw_sizes(batch):
            is_taught = share == self.shares[0] or not self.from_largest
            teachers = frozen if is_taught else dict.fromkeys(frozen, _detach(largest))
            names = {name: _name_term(name, share) for name in self.objective.weights}
            divisors = {
                f"{DIVISOR}.{name}": batch[f"{DIVISOR}.{sized_name}"]
                for name, sized_name in names.items()
                if f"{DIVISOR}.{sized_name}" in batch
            }
            sums = self.objective({STUDENT: views[name_student(share)]}, teachers, {**batch, **divisors})
            terms |= {names[name]: value for name, value in sums.items()}
        return terms

    def draw_sizes(self, batch: Batch) -> tuple[float, ...]:
        """The sizes that this batch trains, the largest first."""
        if STEP not in batch or self.num_sizes == len(self.shares):
            return self.shares
        first, *middle, last = self.shares
        numbers = random.Random(f"sizes {self.seed} {int(batch[STEP])}")
        sample = numbers.sample(middle, self.num_sizes - 2)
        return (first, *(share for share in middle if share in sample), last)


def _name_term(name: str, share: float) -> str:
    return f"{name}@{format_share(share)}"


def _detach(signals: Signals) -> Signals:
    """The signals of a student as those of a teacher, whose weights get no gradient."""
    head = get_head(signals, STUDENT).detach()
    return replace(signals, rows=signals.rows.detach(), head=head, logits=head.logits)
