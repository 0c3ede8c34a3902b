"""A divergence together with the teacher's ranking of the likeliest tokens (TIE-KD)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from potstill.core.types import Batch, Needs, Objective, Signals, Terms, supervised_positions
from potstill.objectives import row_terms
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.divergence import Divergence, forward_kl
from potstill.ops.ranking import RankingRows
from potstill.ops.row_loss import DivergenceRows


@dataclass(frozen=True, kw_only=True)
class TieKD(row_terms.RowObjectiveMixin):
    """tau^2 KL(p || q) + tau (R_top1 + R_other), the hierarchical ranking loss over the `k` likeliest tokens of each.

    The teacher gets no gradient. The two summands are separate terms, each with weight 1.

    Source: Zhang et al. (arXiv:2305.08096). The second half of the paper trains on the student's own predictions, which
    is a choice of data and not part of this objective. Departs from the authors' code: it has a temperature, and no
    1e-6 inside the logarithms, so that KL is 0 at p = q.
    """

    k: int = 5
    divergence: Divergence = forward_kl
    temperature: float = 1.0
    teacher: str = "teacher"
    name: str = "tie_kd"
    additive: ClassVar[bool] = True

    @property
    def weights(self) -> Mapping[str, float]:
        """Two terms, each with weight 1."""
        return {f"{self.name}_divergence": 1.0, f"{self.name}_ranking": 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of student and teacher at the supervised positions."""
        needs = Needs(supervised_positions(batch)[0])
        return {"student": needs, self.teacher: needs}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of supervised positions, for both terms."""
        return dict.fromkeys(self.weights, len(supervised_positions(batch)[1]))

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """The divergence and the ranking loss of each row."""
        inputs = {self.teacher: row_terms.make_logits_fn(frozen[self.teacher])}
        divergence = DivergenceRows(self.divergence, temperature=self.temperature, teacher=self.teacher)
        ranking = RankingRows(self.k, temperature=self.temperature, teacher=self.teacher)
        loss_terms = (row_terms.RowTerm(divergence, inputs), row_terms.RowTerm(ranking, inputs))
        return dict(zip(self.weights, loss_terms, strict=True)), {}


def tie_kd_cost(inputs: CostInputs) -> ObjectiveCost:
    """The teacher's logits of each row."""
    return ObjectiveCost(teacher_products=inputs.rows, logit_copies=(0, 1))


@register_objective(
    "tie_kd",
    help="A divergence, and the order of the `k` likeliest tokens of both models (TIE-KD).",
    cost=tie_kd_cost,
    takes_divergence=True,
    needs_only_last_hidden=True,
    numeric_options={"k": 5.0},
)
def build_tie_kd(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`TieKD` over `k` tokens."""
    return TieKD(
        k=options.get_positive_int("k"),
        divergence=options.divergence,
        temperature=options.temperature,
        name=options.name,
    )
