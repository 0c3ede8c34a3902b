"""Routing: weights by hand, the sorted dispatch beside its definition, work that is really skipped, and the load."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from potstill.ops.routing import Routes, Weighting, choose_experts, dense_dispatch, dispatch, load_balancing_loss

WEIGHTINGS: tuple[Weighting, ...] = ("softmax", "normalized", "straight_through")
ROW = torch.tensor([[1.0, 3.0, 2.0, -1.0]], dtype=torch.float64)
P = ROW.softmax(-1)[0].tolist()


def functions(weights: Tensor) -> list:
    """One expert for each matrix, of which none is linear."""
    return [lambda x, w=w: torch.tanh(x @ w) for w in weights]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_weights_are_those_of_the_formula(k: int) -> None:
    order = [1, 2, 0, 3][:k]
    for weighting in WEIGHTINGS:
        experts, weights = choose_experts(ROW, k, weighting)
        total = 1.0 if weighting == "softmax" else math.fsum(P[e] for e in order)
        assert experts.tolist() == [order]
        assert weights.tolist() == [[pytest.approx(P[e] / total, rel=1e-12) for e in order]]


def test_the_only_expert_of_a_token_has_weight_1_and_a_straight_through_router_learns() -> None:
    gradients = {}
    for weighting in WEIGHTINGS:
        logits = ROW.clone().requires_grad_()
        weights = choose_experts(logits, 1, weighting).weights
        assert (weights.item() == 1) == (weighting != "softmax")
        (gradients[weighting],) = torch.autograd.grad(weights.sum(), logits)
    assert gradients["normalized"].abs().max() < 1e-15
    expected = torch.tensor([float(e == 1) for e in range(4)]).double() - ROW.softmax(-1)  # of log p_1
    torch.testing.assert_close(gradients["straight_through"], expected)
    torch.testing.assert_close(gradients["softmax"], P[1] * expected)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 9),
    num_experts=st.integers(1, 5),
    k=st.integers(1, 3),
    weighting=st.sampled_from(WEIGHTINGS),
    dead=st.integers(0, 4),
)
def test_the_sorted_dispatch_equals_its_definition_in_value_and_every_gradient(
    tokens: int, num_experts: int, k: int, weighting: Weighting, dead: int
) -> None:
    k = min(k, num_experts)
    x, matrices = torch.randn(tokens, 3).double(), torch.randn(num_experts, 3, 3).double()
    logits = torch.randn(tokens, num_experts).double()
    if num_experts > k:
        logits[:, dead % num_experts] = -50.0  # an expert without a token
    outcomes = []
    for form in (dispatch, dense_dispatch):
        leaves = [value.clone().requires_grad_() for value in (x, logits, matrices)]
        y = form(leaves[0], choose_experts(leaves[1], k, weighting), functions(leaves[2]))
        outcomes.append((y, *torch.autograd.grad((y * torch.arange(3 * tokens).reshape(y.shape)).sum(), leaves)))
    for fast, definition in zip(*outcomes, strict=True):
        torch.testing.assert_close(fast, definition, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [dispatch, dense_dispatch])
def test_each_token_is_the_weighted_sum_of_its_experts(form) -> None:
    x, matrices = torch.randn(6, 3).double(), torch.randn(4, 3, 3).double()
    routes = choose_experts(torch.randn(6, 4).double(), 2, "softmax")
    y = form(x, routes, functions(matrices))
    for n in range(6):
        pairs = zip(routes.experts[n].tolist(), routes.weights[n].tolist(), strict=True)
        expected = sum(w * torch.tanh(x[n] @ matrices[e]) for e, w in pairs)
        torch.testing.assert_close(y[n], expected, rtol=0, atol=1e-12)


def test_permuted_tokens_have_permuted_outputs() -> None:
    x, matrices, order = torch.randn(8, 3).double(), torch.randn(4, 3, 3).double(), torch.randperm(8)
    routes = choose_experts(torch.randn(8, 4).double(), 2, "normalized")
    y = dispatch(x, routes, functions(matrices))
    permuted = dispatch(x[order], Routes(routes.experts[order], routes.weights[order]), functions(matrices))
    torch.testing.assert_close(permuted, y[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_only_the_chosen_experts_compute(k: int) -> None:
    matrices, x = torch.randn(8, 16, 16), torch.randn(40, 16)
    routes = choose_experts(torch.randn(40, 8), k, "softmax")
    with FlopCounterMode(display=False) as counter:
        dispatch(x, routes, functions(matrices))
    assert counter.get_total_flops() == 40 * k * 2 * 16 * 16
    rows: list[int] = []

    def count(part: Tensor) -> Tensor:
        rows.append(len(part))
        return part

    single = Routes(torch.full((40, 1), 5), torch.ones(40, 1))
    with torch.no_grad():
        assert torch.equal(dispatch(x, single, [count] * 8), x)
    assert rows == [40]  # the seven others are not called


def test_an_expert_without_a_token_has_zero_gradients_and_not_none() -> None:
    matrices = [torch.randn(3, 3, requires_grad=True) for _ in range(3)]
    routes = Routes(torch.full((4, 1), 1), torch.ones(4, 1))
    dispatch(torch.randn(4, 3), routes, [lambda x, w=w: x @ w for w in matrices]).sum().backward()
    assert [None if w.grad is None else bool(w.grad.any()) for w in matrices] == [False, True, False]


def test_no_token_at_all_gives_no_row() -> None:
    with torch.no_grad():
        routes = choose_experts(torch.empty(0, 3), 2, "normalized")
        assert dispatch(torch.empty(0, 4), routes, functions(torch.randn(3, 4, 4))).shape == (0, 4)


def test_equal_experts_with_weight_1_are_one_expert_bit_for_bit() -> None:
    x, matrix = torch.randn(20, 6).double(), torch.randn(6, 6).double()
    routes = choose_experts(torch.randn(20, 4).double(), 1, "straight_through")
    assert torch.equal(dispatch(x, routes, functions(matrix.expand(4, 6, 6))), torch.tanh(x @ matrix))


def test_the_load_is_the_number_of_the_sheet() -> None:
    # f = (0.5, 0.25, 0.25, 0), P = (0.4125, 0.3125, 0.15, 0.125), loss 1.2875
    p = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.25, 0.25, 0.3, 0.2]])
    assert load_balancing_loss(p.log()[:, None]).item() == pytest.approx(1.2875)
    ragged = torch.cat([p.log(), torch.full((4, 2), -torch.inf)], -1)
    pair = torch.tensor([0.75, 0.25]).log().expand(4, 2)  # a layer of two experts: 2 (1 x 0.75 + 0 x 0.25)
    pair = torch.cat([pair, torch.full((4, 4), -torch.inf)], -1)
    assert load_balancing_loss(torch.stack([ragged, pair], 1)).item() == pytest.approx((1.2875 + 1.5) / 2)
    assert load_balancing_loss(torch.stack([pair], 1), k=3).item() == pytest.approx(1.0)  # every token chooses both
