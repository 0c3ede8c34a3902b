"""Logit distillation from a named teacher that shares the student's vocabulary."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import ClassVar

from potstill.core.errors import UsageError
from potstill.core.types import Batch, Needs, Objective, Signals, Terms, supervised_positions
from potstill.objectives import row_terms
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.spec import ObjectiveOptions, ObjectiveSpec
from potstill.ops.divergence import Divergence, forward_kl
from potstill.ops.row_loss import DivergenceRows


@dataclass(frozen=True, kw_only=True)
class LogitDistillation(row_terms.RowObjectiveMixin):
    """sum over supervised positions of t^2 D(softmax(z_teacher / t), softmax(z_student / t)), in nats.

    The square of the temperature t keeps the gradient's scale (Hinton et al., arXiv:1503.02531, section 2). The teacher
    gets no gradient. The caller cuts both models' logits to the real token ids.

    Departs from the paper: DSKD and MiniMA leave the square out; at their t = 1 or fixed t it is a constant factor.

    Raises: UsageError if the temperature is not positive.
    """

    divergence: Divergence = forward_kl
    temperature: float = 1.0
    teacher: str = "teacher"
    name: str = "distill"
    additive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"temperature {self.temperature} must be positive; 1 compares the unchanged distributions")

    @property
    def weights(self) -> Mapping[str, float]:
        """One term with weight 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of student and teacher at the supervised positions."""
        needs = Needs(supervised_positions(batch)[0])
        return {"student": needs, self.teacher: needs}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """t^2 D(p, q) of each row."""
        loss = DivergenceRows(self.divergence, temperature=self.temperature, teacher=self.teacher)
        return {self.name: row_terms.RowTerm(loss, {self.teacher: row_terms.make_logits_fn(frozen[self.teacher])})}, {}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of supervised positions."""
        return {self.name: len(supervised_positions(batch)[1])}


def logit_distillation_cost(inputs: CostInputs) -> ObjectiveCost:
    """The teacher's logits of each row."""
    return ObjectiveCost(teacher_products=inputs.rows, logit_copies=(0, 1))


def make_divergence_spec(name: str, divergence: Divergence) -> ObjectiveSpec:
    """The spec of the objective that compares logits by `divergence`; its further arguments are the options."""
    numbers = {
        parameter.name: float(parameter.default)
        for parameter in list(signature(divergence).parameters.values())[2:]
        if isinstance(parameter.default, int | float)
    }
    return ObjectiveSpec(
        name=name,
        help=(divergence.__doc__ or "").partition("\n")[0],
        build=build_logit_distillation,
        cost=logit_distillation_cost,
        is_divergence=True,
        needs_teacher_model=False,
        numeric_options=numbers,
    )


def build_logit_distillation(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """`LogitDistillation` under the divergence of the options."""
    return LogitDistillation(divergence=options.divergence, temperature=options.temperature, name=options.name)
