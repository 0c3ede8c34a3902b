"""Logit distillation from any named teacher that shares the student's vocabulary."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from potstill.core.errors import UsageError
from potstill.core.types import Batch, Needs, Signals, Terms, supervised_positions
from potstill.objectives import row_terms
from potstill.ops.divergence import Divergence, forward_kl
from potstill.ops.row_loss import DivergenceRows


@dataclass(frozen=True, kw_only=True)
class LogitDistillation(row_terms.RowObjectiveMixin):
    """sum over supervised positions of t^2 D(softmax(z_teacher / t), softmax(z_student / t)), in nats.

    The square of the temperature t keeps the gradient's scale (Hinton et al., arXiv:1503.02531, section 2). The teacher
    gets no gradient. Both logits are cut to the real ids before they come here.

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
            raise UsageError(
                f"temperature {self.temperature} must be positive; 1 compares the distributions as they are"
            )

    @property
    def weights(self) -> Mapping[str, float]:
        """The one term, weighing 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of student and teacher at the same positions."""
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
