"""MiniLLM's objective: the student is rewarded for writing what its teacher finds likely."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.core.types import Batch, Needs, Signals, Terms, gold_mask, supervised_positions
from potstill.objectives import row_terms
from potstill.ops.advantage import returns_to_go, whiten
from potstill.ops.row_loss import CrossEntropyRows, Weighted

MAX_REWARD = 100.0  # of a reward


@dataclass(frozen=True, kw_only=True)
class MiniLLM(row_terms.RowObjectiveMixin):
    """sum over sampled rows of -c log q(y), with the constant c = w A, or 0 where a clipped objective has no gradient.

        A = whitened R,   R_t = mean of the scaled rewards from t on,   r = log p(y) - log q(y)
        w = q(y) / (mixed p(y) + (1 - mixed) q(y)),   c = 0 where A > 0 and w > 1 + clip, or A < 0 and w < 1 - clip

    p is the teacher, q the student, y what a rollout wrote from their mixture (`train.policy`, minillm). Its gradient
    is that of max(-A rho, -A clip(rho)) at rho = w, in nats; the value itself says nothing. It is no sum over rows,
    since A is whitened over the rows of a pass: `additive` is False. Rows from the data have no part in it.

    The paper's other two terms are objectives of their own: `Distill(divergence=reverse_kl)` is the single step,
    `CrossEntropy`, which is of the data alone, keeps the language.

    Source: Gu et al., "MiniLLM" (arXiv:2306.08543), section 2.2; the numbers are those of the authors' GPT-2 script.
    Departs from the paper: one update for each rollout, where its code makes four, so q is what it was when it wrote;
    A is whitened within a pass, where the code whitens a step; the single step is taken at rows of the data as well.
    """

    teacher_share: float = 0.2
    scale: float = 0.5
    clip: float = 0.2
    discount: float = 0.95
    teacher: str = "teacher"
    name: str = "policy"
    additive: ClassVar[bool] = False

    @property
    def weights(self) -> Mapping[str, float]:
        """The one term, weighing 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of student and teacher at the same positions."""
        needs = Needs(supervised_positions(batch)[0])
        return {"student": needs, self.teacher: needs}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of sampled rows."""
        return {self.name: int((~gold_mask(batch)).sum())}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """-c log q(y) of each row."""
        weights = self.compute_coefficients(views["student"], frozen[self.teacher], batch)
        inputs = {self.name: lambda start, stop: weights[start:stop]}
        return {self.name: row_terms.RowTerm(Weighted(CrossEntropyRows(), self.name), inputs)}, {}

    @torch.no_grad()
    def compute_coefficients(self, student: Signals, teacher: Signals, batch: Batch) -> Float[Tensor, " N"]:
        """c of each supervised row, 0 for those from the data."""
        _, targets, segment = supervised_positions(batch)
        is_sampled = ~gold_mask(batch)
        log_q, log_p = (
            row_terms.compute_target_log_probs(signals, targets)[is_sampled] for signals in (student, teacher)
        )
        rewards = ((log_p - log_q) / self.scale).clamp(-MAX_REWARD, MAX_REWARD)
        advantage = whiten(returns_to_go(rewards, segment[is_sampled], discount=self.discount))
        ratio = 1 / (self.teacher_share * (log_p - log_q).exp() + 1 - self.teacher_share)
        is_clipped = torch.where(advantage > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
        coefficients = torch.zeros(len(targets), dtype=log_q.dtype, device=log_q.device)
        coefficients[is_sampled] = (advantage * ratio).masked_fill(is_clipped, 0.0)
        return coefficients
