"""The feed-forward of experts: by hand, with a shared expert, as one expert, and what it refuses."""

from functools import partial

import pytest
import torch
from torch.nn.functional import silu

from potstill.core.blueprint import Rotary
from potstill.core.errors import UsageError
from potstill.core.parts import DENSE
from potstill.layers.ffn.experts import Experts, RoutedExperts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.norm import RMSNorm
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory


def make(facts: Experts, hidden: int) -> RoutedExperts:
    return RoutedExperts(facts, PartFactory(hidden, partial(RMSNorm, eps=1e-5))).double()


def places(rows: int, tokens: int) -> Positions:
    return Positions(torch.arange(tokens).expand(rows, -1), Rotary(), 64)


@pytest.mark.parametrize("weighting", ["softmax", "normalized", "straight_through"])
@pytest.mark.parametrize("shared", [None, SwiGLU(3)])
def test_it_is_the_formula_token_by_token(weighting: str, shared: SwiGLU | None) -> None:
    layer, x = make(Experts(SwiGLU(5), 4, 2, weighting, shared), 6), torch.randn(2, 3, 6).double()
    y = layer(x, places(2, 3))
    for b, t in ((b, t) for b in range(2) for t in range(3)):
        token = x[b, t]
        p = (layer.router.weight @ token).softmax(-1)
        chosen = p.argsort(descending=True)[:2].tolist()
        total = 1.0 if weighting == "softmax" else p[chosen].sum()
        expected = sum(p[e] / total * compute(layer.experts[e], token) for e in chosen)
        if layer.shared is not None:
            expected = expected + (layer.shared_gate.weight @ token).sigmoid() * compute(layer.shared, token)
        torch.testing.assert_close(y[b, t], expected, rtol=0, atol=1e-12)


def compute(expert: torch.nn.Module, token: torch.Tensor) -> torch.Tensor:
    return expert.down.weight @ (silu(expert.gate.weight @ token) * (expert.up.weight @ token))


def test_one_expert_is_the_dense_feed_forward_bit_for_bit() -> None:
    layer, x = make(Experts(SwiGLU(5), 1), 6), torch.randn(2, 3, 6).double()
    torch.testing.assert_close(layer(x, places(2, 3)), layer.experts[0](x, places(2, 3)), rtol=0, atol=0)


def test_the_cost_of_a_token_depends_on_the_active_experts_alone() -> None:
    costs = [Experts(SwiGLU(10), count, 2).cost(8, 1.0, DENSE).matrices for count in (2, 8)]
    assert costs == [2 * 3 * 8 * 10 + 2 * 8, 2 * 3 * 8 * 10 + 8 * 8]
    assert Experts(SwiGLU(10), 8, 2, shared=SwiGLU(4)).cost(8, 1.0, DENSE).matrices == costs[1] + 3 * 8 * 4 + 8


def test_the_shared_expert_is_cut_by_itself() -> None:
    facts = Experts(SwiGLU(10), 2, shared=SwiGLU(4))
    assert {name: cut.size for name, cut in facts.cuts().items()} == {"expert_ffn": 10, "shared_ffn": 4}
    assert facts.cuts()["expert_ffn"].measured_at == ("experts.0.down", "experts.1.down")
    assert facts.resize({"shared_ffn": 3}) == Experts(SwiGLU(10), 2, shared=SwiGLU(3))


def test_a_router_of_bfloat16_is_followed_and_rows_are_rounded_up() -> None:
    layer, x = make(Experts(SwiGLU(5), 2), 6), torch.randn(1, 50, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer.float().router.weight.zero_()[0, 0] = 100.0
        x[..., 0] = torch.linspace(-1, 1, 50)[:, None].mT  # half of the tokens to each expert
        y = layer(x, places(1, 50))
    torch.testing.assert_close(y, layer(x, places(1, 50)), rtol=0, atol=0.05)
    assert y.dtype == x.dtype


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Experts(SwiGLU(4), 2, 3), "choose at most as many"),
        (lambda: Experts(SwiGLU(4), 0), "at least 1"),
        (lambda: Experts(SwiGLU(4), 2, weighting="soft"), "choose one of softmax, normalized"),
        (lambda: Experts(Experts(SwiGLU(4), 2), 2), "router of its own"),
    ],
)
def test_what_cannot_be_is_refused(build, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()
