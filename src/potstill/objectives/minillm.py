"""MiniLLM's policy gradient: rewards the student for tokens that the teacher finds likely."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.core.types import Batch, Needs, Objective, Signals, Terms, gold_mask, supervised_positions
from potstill.objectives import row_terms
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.model_info import PairInfo
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.advantage import returns_to_go, whiten
from potstill.ops.divergence import reverse_kl
from potstill.ops.row_loss import CrossEntropyRows, Weighted

MAX_REWARD = 100.0  # rewards are clamped to this absolute value


@dataclass(frozen=True, kw_only=True)
class MiniLLM(row_terms.RowObjectiveMixin):
    """sum over sampled rows of -c log q(y), with constants c = w A, or 0 where the clipped objective has no gradient.

        A = whitened R,   R_t = mean of the scaled rewards from t onward,   r = log p(y) - log q(y)
        w = q(y) / (mixed p(y) + (1 - mixed) q(y)),   c = 0 where A > 0 and w > 1 + clip, or A < 0 and w < 1 - clip

    p is the teacher, q the student, y the tokens that a rollout sampled from their mixture (`train.rollouts`, minillm).
    The gradient is that of max(-A rho, -A clip(rho)) at rho = w, in nats; the value itself has no meaning. Whitening A
    over the rows of a pass makes the term no sum over rows: `additive` is False. Rows from the data do not take part.

    The paper's other two terms are separate objectives: `LogitDistillation(divergence=reverse_kl)` is the single step,
    and `CrossEntropy`, over the data only, is the language-modeling loss.

    Source: Gu et al., "MiniLLM" (arXiv:2306.08543), section 2.2; the defaults are those of the authors' GPT-2 script.
    Departs from the paper: one update for each rollout instead of four in its code, so q is the model that sampled. A
    is whitened within a pass instead of a step. The single step covers rows of the data as well.
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
        """One term with weight 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of student and teacher at the supervised positions."""
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
        """c of each supervised row, 0 for rows from the data."""
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


# the option names on the command line, with the defaults of `MiniLLM`
MINILLM_DEFAULTS = {"mixed": 0.2, "scale": 0.5, "clip": 0.2, "discount": 0.95}


def minillm_cost(inputs: CostInputs) -> ObjectiveCost:
    """The teacher's logits of each row."""
    return ObjectiveCost(teacher_products=inputs.rows, logit_copies=(0, 1))


@register_objective(
    "minillm",
    help="A policy gradient on the student's own text, with reverse KL of the next token (MiniLLM).",
    cost=minillm_cost,
    rollout="minillm",
    numeric_options=MINILLM_DEFAULTS,
)
def build_minillm(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """The policy gradient and the single step, which compares the next token only; both with weight 1."""
    single_step = LogitDistillation(
        divergence=reverse_kl, temperature=options.temperature, name=f"{options.name}_single_step"
    )
    teacher_share, scale, clip, discount = (options.numeric_options[name] for name in MINILLM_DEFAULTS)
    policy = MiniLLM(
        teacher_share=teacher_share, scale=scale, clip=clip, discount=discount, name=f"{options.name}_policy"
    )
    return WeightedSum((1.0, policy), (1.0, single_step))
