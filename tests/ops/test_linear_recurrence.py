"""The element-wise recurrence: the scan equals the loop, and the loop its sum."""

import math

import pytest
import torch
from torch import Tensor

from potstill.ops.linear_recurrence import linear_recurrence, recurrence_loop


def inputs(length: int, *, batch: int = 2, width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    decay = torch.rand(batch, length, width, dtype=torch.float64)
    decay[:, 2::5] = 0  # where a document begins
    return decay, torch.randn_like(decay), torch.randn(batch, width, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 9, 10, 31])
@pytest.mark.parametrize("has_state", [False, True])
def test_the_scan_is_the_loop_in_value_and_every_gradient(length: int, has_state: bool) -> None:
    decay, u, state = inputs(length)
    outcomes = []
    for form in (linear_recurrence, recurrence_loop):
        leaves = [x.clone().requires_grad_() for x in ((decay, u, state) if has_state else (decay, u))]
        h = form(*leaves)
        weights = torch.arange(1.0, h.numel() + 1).reshape(h.shape)
        outcomes.append((h, *torch.autograd.grad((h * weights).sum(), leaves)))
    for scan, loop in zip(*outcomes, strict=True):
        torch.testing.assert_close(scan, loop, rtol=1e-12, atol=1e-12)


def test_each_input_decays_by_the_product_of_what_follows() -> None:
    decay, u, state = inputs(6)
    h = recurrence_loop(decay, u, state)
    for t in range(6):
        parts = [math.prod(decay[1, s + 1 : t + 1, 2].tolist()) * u[1, s, 2].item() for s in range(t + 1)]
        first = math.prod(decay[1, : t + 1, 2].tolist()) * state[1, 2].item()
        assert math.isclose(h[1, t, 2].item(), first + sum(parts), rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("edge", [1, 4, 9])
def test_two_calls_are_one(edge: int) -> None:
    decay, u, state = inputs(10)
    first = linear_recurrence(decay[:, :edge], u[:, :edge], state)
    second = linear_recurrence(decay[:, edge:], u[:, edge:], first[:, -1])
    torch.testing.assert_close(torch.cat([first, second], 1), linear_recurrence(decay, u, state), rtol=1e-12, atol=0)


def test_a_decay_of_one_without_inputs_keeps_the_state_and_of_zero_forgets_it() -> None:
    state = torch.randn(2, 3)
    ones, zeros = torch.ones(2, 50, 3), torch.zeros(2, 50, 3)
    assert torch.equal(linear_recurrence(ones, zeros, state)[:, -1], state)
    assert torch.equal(linear_recurrence(zeros, ones, state), ones)


def test_a_long_text_of_tiny_decays_stays_finite() -> None:
    decay = torch.full((1, 4000, 1), 1e-6, requires_grad=True)
    h = linear_recurrence(decay, torch.ones_like(decay))
    (gradient,) = torch.autograd.grad(h.sum(), decay)
    assert h.isfinite().all()
    assert gradient.isfinite().all()
