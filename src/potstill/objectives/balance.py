"""The load-balancing loss of mixture-of-experts models, so that the router uses all experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.types import Batch, Needs, Objective, Signals, Terms
from potstill.layers.ffn.experts import ROUTER_LOGITS
from potstill.objectives.cost import no_cost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.routing import load_balancing_loss


@dataclass(frozen=True, kw_only=True)
class Balance:
    """E sum over experts i of f_i P_i, the mean over layers; 1 where all E experts get the same load.

    f_i is the share of the `k` N choices of N tokens that go to expert i: a token chooses its `k` likeliest experts.
    P_i is the mean of the router's probability of expert i. Only P_i has a gradient. The loss of a micro-batch covers
    its own tokens without padding, and a step takes the mean over micro-batches. So it is not a sum over rows:
    `additive` is False.

    Source: Fedus et al., Switch Transformers (arXiv:2101.03961), equations 4 to 6, without alpha, which is the weight
    of the term. There k = 1. Departs from the paper: the mean over layers.

    Raises: UnsupportedModel in a call, if the student reports no router.
    """

    k: int = 1
    name: str = "balance"
    additive: ClassVar[bool] = False

    @property
    def weights(self) -> Mapping[str, float]:
        """One term with weight 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The student's router at every token."""
        return {"student": Needs(batch["documents"] >= 0, extras=frozenset({ROUTER_LOGITS}))}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """1 for each micro-batch."""
        return {self.name: 1}

    def __call__(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """The loss of the micro-batch."""
        if ROUTER_LOGITS not in views["student"].extras:
            raise UnsupportedModel("the student reports no router; the objective balance needs a mixture of experts")
        router_logits = views["student"].extras[ROUTER_LOGITS]
        if self.k > router_logits.shape[-1]:
            raise UsageError(f"{self.name}: k is {self.k}, and the student has {router_logits.shape[-1]} experts")
        return {self.name: load_balancing_loss(router_logits, k=self.k)}


@register_objective(
    "balance",
    help="The load of the student's experts (Switch Transformers); no teacher.",
    cost=no_cost,
    uses_teacher=False,
    needs_teacher_model=False,
    supports_cross_tokenizer=True,
    numeric_options={"k": 1.0},
)
def build_balance(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """`Balance` of the `k` experts that each token chooses."""
    return Balance(k=options.get_positive_int("k"), name=options.name)
