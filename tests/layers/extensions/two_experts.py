"""A feed-forward of experts in one file: a router sends each token to one of them (arXiv:2101.03961, Eq. 2)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from potstill.core.parts import Cost, Cut, FeedForward, Linear, Shapes, kind, prefix_names
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory, builds

ROUTER_PROBABILITIES = "router_probabilities"


@kind("test_experts")
@dataclass(frozen=True)
class Experts(FeedForward):
    """Experts of equal width; the router's probabilities are reported."""

    reports = (ROUTER_PROBABILITIES,)

    experts: tuple[SwiGLU, ...]

    @classmethod
    def examples(cls) -> "tuple[Experts, ...]":
        """Two experts."""
        return (cls((SwiGLU(6), SwiGLU(6))),)

    def shapes(self, hidden: int, linear: Linear) -> Shapes:
        """The router and every expert."""
        weights = prefix_names("router", linear.shapes(hidden, len(self.experts)))
        for i, expert in enumerate(self.experts):
            weights |= prefix_names(f"experts.{i}", expert.shapes(hidden, linear))
        return weights

    def cost(self, hidden: int, seen: float, linear: Linear) -> Cost:
        """The router and one expert."""
        return self.experts[0].cost(hidden, seen, linear).plus(Cost(float(hidden * len(self.experts)), 0.0))

    def cuts(self) -> Mapping[str, Cut]:
        """Neurons, the same ones in each expert."""
        modules = tuple(f"experts.{i}.down" for i in range(len(self.experts)))
        return {"expert_ffn": Cut(self.experts[0].width, modules)}

    def resize(self, sizes: Mapping[str, int]) -> "Experts":
        """Narrower experts."""
        return replace(self, experts=tuple(replace(expert, width=sizes["expert_ffn"]) for expert in self.experts))


@builds(Experts)
class ExpertsFeedForward(nn.Module):
    """p_e(x) E_e(x) of the likeliest expert e."""

    def __init__(self, facts: Experts, factory: PartFactory) -> None:
        super().__init__()
        self.router = factory.make_linear(factory.hidden, len(facts.experts))
        self.experts = nn.ModuleList(factory.make_part(expert) for expert in facts.experts)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Each token by one expert."""
        probabilities = self.router(x).softmax(-1)
        positions.report(ROUTER_PROBABILITIES, probabilities)
        chosen, y = probabilities.argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            is_chosen = chosen == i
            if is_chosen.any():
                outputs = expert(x[is_chosen][None], positions)[0] * probabilities[is_chosen][:, i, None]
                y = y.masked_scatter(is_chosen[..., None], outputs)
        return y
