"""Likelihoods of a text that two models cut otherwise, and the row loss that carries their derivative."""

import pytest
import torch

from potstill.ops.fused import sum_row_losses, sum_row_losses_densely
from potstill.ops.likelihood import binary_kl, binary_kl_with_slope, sum_groups
from potstill.ops.row_loss import Tangent


def test_it_is_the_divergence_between_two_coins() -> None:
    log_p, log_q = torch.tensor([0.5, 0.9]).double().log(), torch.tensor([0.25, 0.9]).double().log()
    found = binary_kl(log_p, log_q)
    assert found[0].item() == pytest.approx(0.143841, rel=1e-5)  # log 2 / 2 + log(2/3) / 2
    assert abs(found[1].item()) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_finite_and_at_least_zero_from_certain_to_impossible(dtype: torch.dtype) -> None:
    logs = torch.tensor([0.0, -1e-9, -1e-3, -1.0, -30.0, -200.0, -1e4], dtype=dtype)
    log_p, log_q = (x.flatten() for x in torch.meshgrid(logs, logs, indexing="ij"))
    values, slope = binary_kl_with_slope(log_p, log_q)
    assert values.isfinite().all()
    assert slope.isfinite().all()
    assert (values > -1e-6).all()
    assert (values[log_p == log_q].abs() < 1e-6).all()


def test_its_slope_is_its_derivative() -> None:
    torch.manual_seed(0)
    log_p, log_q = -torch.rand(50).double() * 5, (-torch.rand(50).double() * 5).requires_grad_()
    values, slope = binary_kl_with_slope(log_p, log_q.detach())
    torch.testing.assert_close(values, binary_kl(log_p, log_q.detach()))
    torch.testing.assert_close(slope, torch.autograd.grad(binary_kl(log_p, log_q).sum(), log_q)[0])


def test_rows_are_summed_by_their_group() -> None:
    assert sum_groups(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 2]), 3).tolist() == [2.0, 0.0, 5.0]


@pytest.mark.parametrize("chunk", [2, 100])
def test_a_tangent_has_the_value_and_the_gradient_of_what_it_stands_for(chunk: int) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(5, 4).double().requires_grad_(), torch.randn(9, 4).double().requires_grad_()
    targets, log_p = torch.randint(0, 9, (5,)), torch.tensor([-2.0]).double()
    log_q = (rows @ weight.mT).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    whole = binary_kl(log_p, log_q[1:4].sum()[None])[0]  # rows 1 to 3 are one group, 0 and 4 in none
    expected = torch.autograd.grad(whole, (rows, weight))
    value, slope = binary_kl_with_slope(log_p, log_q[1:4].sum()[None].detach())
    told = torch.zeros(5, 3).double()
    told[1, 0], told[1:4, 1], told[1:4, 2] = value, slope, log_q[1:4].detach()
    head, known = (weight, None, 1.0, None), {"told": lambda a, b: told[a:b]}
    losses = [Tangent("told")]
    (literal,) = sum_row_losses_densely(losses, rows, head, targets=targets, frozen=known)
    (chunked,) = sum_row_losses(losses, rows, head, targets=targets, frozen=known, mix=[1.0], chunk=chunk)
    for found in (literal, chunked):
        torch.testing.assert_close(found, whole)
        for ours, theirs in zip(torch.autograd.grad(found, (rows, weight)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
