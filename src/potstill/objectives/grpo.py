"""The policy gradient over groups of samples: GRPO, Dr. GRPO, DAPO and RLOO."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.core.errors import DataError
from potstill.core.types import (
    ADVANTAGES,
    MAX_TOKENS,
    OLD_LOG_P,
    REFERENCE,
    SAMPLING_LOG_P,
    Batch,
    Needs,
    Objective,
    Signals,
    Terms,
    supervised_positions,
)
from potstill.objectives import row_terms
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.policy_options import CONSTANT, NUMERIC_OPTIONS, SEQUENCES, TEXT_OPTIONS, PolicyOptions
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.policy_gradient import Clip, PolicyRows, TargetStatistic, estimate_kl, find_clipped
from potstill.ops.row_loss import AtTemperature, RowLoss, Weighted

KL, CLIPPED, SAMPLING_GAP = "kl", "clipped", "sampling_gap"  # terms of weight 0


@dataclass(frozen=True, kw_only=True)
class GRPO(row_terms.RowObjectiveMixin):
    """sum over trained tokens of weight (-min(rho A, clip(rho) A) + kl k3); see `ops.policy_gradient` for the parts.

    The batch has `advantages [documents]`, one for each sample, which `train.rollouts.grouped` computes before anything
    is counted. So the loss is a sum over tokens, and does not depend on how a step is split. `normalization` of
    `policy` sets the weight of a token and the count; see `PolicyOptions`. With `old_log_p [1 T]`, the log-probability
    of each token under the policy that drew it, rho is a ratio; without, it is 1 and only has a gradient.

    All log-probabilities have the temperature of the sampling. Terms of weight 0 are means over tokens: `kl` (k3),
    `clipped` (the share without a gradient), and `sampling_gap` (the absolute difference between the log-probabilities
    of training and decoding).

    Sources: see `PolicyOptions`. Departs from DeepSeekMath: k3 is not weighted by the ratio, as in TRL and verl.
    """

    policy: PolicyOptions = field(default_factory=PolicyOptions)
    name: str = "grpo"
    additive: ClassVar[bool] = True

    @property
    def weights(self) -> Mapping[str, float]:
        """1 for the loss, 0 for what is only measured."""
        return {self.name: 1.0, **dict.fromkeys(self.metrics, 0.0)}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the terms of weight 0."""
        policy = self.policy
        return (*([KL] if policy.uses_reference else []), *([CLIPPED] if policy.updates > 1 else []), SAMPLING_GAP)

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of the student, and of the reference where there is a penalty."""
        needs = Needs(supervised_positions(batch)[0])
        return {"student": needs, REFERENCE: needs} if self.policy.uses_reference else {"student": needs}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The divisor of the loss as `normalization` says, and the number of tokens for the means."""
        documents = supervised_positions(batch)[2]
        count, num_samples = len(documents), len(documents.unique())
        if self.policy.normalization == SEQUENCES:
            count = num_samples
        elif self.policy.normalization == CONSTANT:
            count = num_samples * self._get_length(batch)
        return {self.name: count, **dict.fromkeys(self.metrics, len(documents))}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """All terms, over the student's rows."""
        inputs = {f"{self.name}.{key}": row for key, row in self._make_inputs(frozen, batch).items()}
        old = f"{self.name}.{OLD_LOG_P}" if OLD_LOG_P in batch else None
        reference = f"{self.name}.{REFERENCE}" if self.policy.uses_reference else None
        advantages, clip = f"{self.name}.{ADVANTAGES}", Clip(self.policy.clip_low, self.policy.clip_high)
        rows = PolicyRows(advantages=advantages, old=old, reference=reference, clip=clip, kl=self.policy.kl)
        losses: dict[str, RowLoss] = {self.name: rows}
        if self.policy.normalization == SEQUENCES:
            losses[self.name] = Weighted(rows, f"{self.name}.weights")
        sampling = f"{self.name}.{SAMPLING_LOG_P}"
        statistics = {
            KL: lambda log_q, row: estimate_kl(log_q, row[reference]),
            CLIPPED: lambda log_q, row: find_clipped(log_q, row.get(old, log_q), row[advantages], clip).to(log_q.dtype),
            SAMPLING_GAP: lambda log_q, row: (row.get(old, log_q) - row[sampling]).abs(),
        }
        losses |= {name: TargetStatistic(statistics[name]) for name in self.metrics}
        if self.policy.temperature != 1:
            losses = {name: AtTemperature(loss, self.policy.temperature) for name, loss in losses.items()}
        row_inputs = {name: lambda start, stop, x=x: x[start:stop] for name, x in inputs.items()}
        return {name: row_terms.RowTerm(loss, row_inputs) for name, loss in losses.items()}, {}

    @torch.no_grad()
    def _make_inputs(self, frozen: Mapping[str, Signals], batch: Batch) -> dict[str, Float[Tensor, " N"]]:
        """The inputs of each row."""
        if ADVANTAGES not in batch:
            raise DataError(f"the batch has no advantages of samples; train {self.name} on prompts, by potstill align")
        positions, targets, documents = supervised_positions(batch)
        inputs = {
            ADVANTAGES: batch[ADVANTAGES][documents],
            SAMPLING_LOG_P: read_tokens(batch, SAMPLING_LOG_P, positions),
        }
        if OLD_LOG_P in batch:
            inputs[OLD_LOG_P] = read_tokens(batch, OLD_LOG_P, positions)
        if self.policy.normalization == SEQUENCES:
            inputs["weights"] = 1 / torch.bincount(documents)[documents].double()
        if self.policy.uses_reference:
            temperature = self.policy.temperature
            inputs[REFERENCE] = row_terms.compute_target_log_probs(frozen[REFERENCE], targets, temperature=temperature)
        return inputs

    def _get_length(self, batch: Batch) -> int:
        """The constant length by which the loss is divided."""
        if not self.policy.length and MAX_TOKENS not in batch:
            raise DataError(f"the batch does not say how long a sample may be; give {self.name} a length")
        return self.policy.length or int(batch[MAX_TOKENS])


def read_tokens(batch: Batch, name: str, positions: Tensor) -> Float[Tensor, " N"]:
    """The values `[B T]` of the tokens that the rows at `positions` predict."""
    return batch[name][:, 1:][positions[:, :-1]]


def grpo_cost(inputs: CostInputs) -> ObjectiveCost:
    """The reference's logits of each row, where there is a penalty."""
    needs_reference = float(inputs.options["kl"]) > 0
    return ObjectiveCost(teacher_products=inputs.rows, logit_copies=(0, 1)) if needs_reference else ObjectiveCost()


def choose_networks(numeric_options: Mapping[str, float]) -> tuple[str, ...]:
    """The reference, where there is a penalty."""
    return (REFERENCE,) if numeric_options["kl"] > 0 else ()


@register_objective(
    "grpo",
    help="A policy gradient over groups of samples with rewards: variant=grpo, dr_grpo, dapo or rloo.",
    cost=grpo_cost,
    uses_teacher=False,
    needs_teacher_model=False,
    rollout="grouped",
    data="prompts",
    networks=choose_networks,
    numeric_options=NUMERIC_OPTIONS,
    text_options=TEXT_OPTIONS,
)
def build_grpo(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """The policy gradient of the variant, with the options that are given."""
    return GRPO(policy=PolicyOptions.from_options(options.numeric_options, options.text_options), name=options.name)
