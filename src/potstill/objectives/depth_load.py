"""The load of layers that tokens may skip: MoDification's objective, which closes their gates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from potstill.core.depth import EXECUTED, GATES
from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.types import Batch, Needs, Objective, Signals, Terms
from potstill.objectives.cost import no_cost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.spec import ObjectiveOptions, register_objective


@dataclass(frozen=True, kw_only=True)
class DepthLoad:
    """sum over gated layers j of F_j G_j: F_j is the share of tokens that run, G_j the mean gate.

    Only G_j has a gradient, so every gate of a layer that many tokens run through falls, and with it the load. While
    the mean of F_j over layers is at most `target`, the loss is 0. The term NAME_share is this mean load. It has weight
    0 and is in the metrics because a load that does not fall is a failed run. As in `Balance`, the loss of a
    micro-batch covers its tokens without padding, and `additive` is False.

    Source: Zhang et al., MoDification (arXiv:2410.14268), without alpha, which is the weight of the term (0.01).
    Departs from the paper: `target`.

    Raises: UsageError for a target that is no share; UnsupportedModel in a call, if the student has no gates.
    """

    target: float = 0.0
    name: str = "load"
    additive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.target < 1:
            raise UsageError(f"{self.name}: target is {self.target:g}; choose a share from 0 to below 1")

    @property
    def share_name(self) -> str:
        """The name of the term that holds the mean load."""
        return f"{self.name}_share"

    @property
    def weights(self) -> Mapping[str, float]:
        """The loss with weight 1, and the mean load with weight 0."""
        return {self.name: 1.0, self.share_name: 0.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The student's gates at every token."""
        return {"student": Needs(batch["documents"] >= 0, extras=frozenset({GATES, EXECUTED}))}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """1 for each micro-batch."""
        return dict.fromkeys(self.weights, 1)

    def __call__(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """The loss of the micro-batch, and its mean load."""
        extras = views["student"].extras
        if GATES not in extras:
            raise UnsupportedModel("the student has no depth gates; make some with potstill convert --to depths")
        loss, share = depth_load(extras[GATES], extras[EXECUTED])
        return {self.name: loss if share > self.target else 0 * loss, self.share_name: share}


def depth_load(
    gates: Float[Tensor, "N R"], executed: Float[Tensor, "N R"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(sum_j F_j G_j over R layers, mean_j F_j), F_j = mean of `executed`, 0 or 1, and G_j = mean of `gates`."""
    shares = executed.detach().mean(0)
    return (shares * gates.mean(0)).sum(), shares.mean()


@register_objective(
    "load",
    help="The share of tokens that run through gated layers (MoDification); no teacher.",
    cost=no_cost,
    uses_teacher=False,
    needs_teacher_model=False,
    supports_cross_tokenizer=True,
    numeric_options={"target": 0.0},
)
def build_depth_load(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """`DepthLoad` above `target`."""
    return DepthLoad(target=options.numeric_options["target"], name=options.name)
