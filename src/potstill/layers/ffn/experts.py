"""A feed-forward of experts: a router sends each token to a few of them (arXiv:2101.03961, Eq. 2; arXiv:2401.04088)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from potstill.core.errors import UsageError
from potstill.core.parts import DENSE, Cost, Cut, FeedForward, Linear, Shapes, check_positive, kind, prefix_names
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory, builds
from potstill.ops.routing import Weighting, choose_experts, dense_dispatch, dispatch

ROUTER_LOGITS = "router_logits"  # the report, named as Hugging Face names it


@kind("experts")
@dataclass(frozen=True)
class Experts(FeedForward):
    """sum over the `top_k` likeliest of `count` equally shaped experts of w_e E_e(x), p = softmax(router x).

    `weighting` makes the weights w of p (`ops.routing`): `softmax`, `normalized` or `straight_through`. A `shared`
    expert S adds sigmoid(g x) S(x) to every token (Qwen2-MoE, arXiv:2407.10671, section 2.2.2). The router and the
    gate g are plain matrices without bias, whatever the layer's kind of linear map is.

    Raises: UsageError for fewer experts than `top_k`, an unknown weighting, or an expert that has experts itself.
    """

    reports = (ROUTER_LOGITS,)

    expert: FeedForward
    count: int
    top_k: int = 1
    weighting: str = "normalized"
    shared: FeedForward | None = None

    def __post_init__(self) -> None:
        check_positive(count=self.count, top_k=self.top_k)
        if self.top_k > self.count:
            raise UsageError(f"top_k is {self.top_k}, and there are {self.count} experts; choose at most as many")
        if self.weighting not in get_args(Weighting):
            names = ", ".join(get_args(Weighting))
            raise UsageError(f"there is no weighting {self.weighting!r} of experts; choose one of {names}")
        if self.expert.reports or (self.shared is not None and self.shared.reports):
            raise UsageError("an expert cannot have a router of its own; choose another kind of feed-forward for it")

    @classmethod
    def examples(cls) -> "tuple[Experts, ...]":
        straight_through = cls(SwiGLU(4, bias=True), 3, weighting="straight_through")
        return (cls(SwiGLU(6), 4, 2), straight_through, cls(SwiGLU(4), 2, 1, "softmax", shared=SwiGLU(6)))

    def shapes(self, hidden: int, linear: Linear) -> Shapes:
        """Name and shape of each weight in a model of width `hidden`."""
        weights = prefix_names("router", DENSE.shapes(hidden, self.count))
        for i in range(self.count):
            weights |= prefix_names(f"experts.{i}", self.expert.shapes(hidden, linear))
        if self.shared is not None:
            weights |= prefix_names("shared", self.shared.shapes(hidden, linear))
            weights |= prefix_names("shared_gate", DENSE.shapes(hidden, 1))
        return weights

    def cost(self, hidden: int, seen: float, linear: Linear) -> Cost:
        """The router, `top_k` experts, and the shared expert with its gate."""
        expert = self.expert.cost(hidden, seen, linear)
        cost = Cost(float(hidden * self.count), 0.0).plus(Cost(*(self.top_k * value for value in expert)))
        if self.shared is None:
            return cost
        return cost.plus(self.shared.cost(hidden, seen, linear)).plus(Cost(float(hidden), 0.0))

    def cuts(self) -> Mapping[str, Cut]:
        """The cuts of an expert as `expert_NAME`, the same units in each expert; those of the shared one likewise."""
        cuts = {}
        for name, part, modules in self._list_parts():
            for cut_name, cut in part.cuts().items():
                places = tuple(f"{module}.{place}" for module in modules for place in cut.measured_at)
                cuts[f"{name}_{cut_name}"] = replace(cut, measured_at=places)
        return cuts

    def resize(self, sizes: Mapping[str, int]) -> "Experts":
        """The same experts with other sizes of their cuts."""
        changed: dict[str, Any] = {}
        for name, part, _ in self._list_parts():
            prefix = f"{name}_"
            part_sizes = {cut.removeprefix(prefix): n for cut, n in sizes.items() if cut.startswith(prefix)}
            changed |= {name: part.resize(part_sizes)} if part_sizes else {}
        return replace(self, **changed)

    def _list_parts(self) -> list[tuple[str, FeedForward, list[str]]]:
        """Field, facts and modules of the routed experts, and of the shared one."""
        routed = ("expert", self.expert, [f"experts.{i}" for i in range(self.count)])
        return [routed] if self.shared is None else [routed, ("shared", self.shared, ["shared"])]


@builds(Experts)
class RoutedExperts(nn.Module):
    """The weighted sum of each token's experts. It reports the router's logits `[B T E]`.

    With `is_dense` every expert computes all tokens, so that no token rounds by the number of others.
    """

    def __init__(self, facts: Experts, factory: PartFactory) -> None:
        super().__init__()
        self.facts, self.is_dense, dense = facts, False, replace(factory, linear=DENSE)
        self.router = dense.make_linear(factory.hidden, facts.count)
        self.experts = nn.ModuleList(factory.make_part(facts.expert) for _ in range(facts.count))
        self.shared = None if facts.shared is None else factory.make_part(facts.shared)
        self.shared_gate = None if facts.shared is None else dense.make_linear(factory.hidden, 1)

    def forward(self, x: Float[Tensor, "B T D"], positions: Positions) -> Float[Tensor, "B T D"]:
        """Each token by its experts."""
        router_logits = self.router(x)
        positions.report(ROUTER_LOGITS, router_logits)
        y = self._compute_experts(x, router_logits, positions)
        if self.shared is None or self.shared_gate is None:
            return y
        shared: Tensor = self.shared_gate(x).sigmoid() * self.shared(x, positions)
        return y + shared

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the tokens of each expert would be compiled in
    def _compute_experts(self, x: Tensor, router_logits: Tensor, positions: Positions) -> Tensor:
        routes = choose_experts(router_logits.flatten(0, 1), self.facts.top_k, cast(Weighting, self.facts.weighting))
        functions = [partial(_compute_expert, expert, positions) for expert in self.experts]
        combine = dense_dispatch if self.is_dense else dispatch
        return combine(x.flatten(0, 1), routes, functions).unflatten(0, x.shape[:2])


def _compute_expert(expert: nn.Module, positions: Positions, rows: Tensor) -> Tensor:
    y: Tensor = expert(rows[None], positions)[0]
    return y
