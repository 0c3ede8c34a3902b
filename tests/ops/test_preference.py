"""Losses of preferences: literal numbers, and laws of each formula."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from potstill.ops import preference
from potstill.ops.preference import Side


def side(policy: float, reference: float, tokens: int) -> Side:
    values = (torch.tensor([value], dtype=torch.float64) for value in (policy, reference, tokens))
    return Side(*values)


CHOSEN, REJECTED = side(-10, -12, 5), side(-11, -10, 4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (preference.dpo(CHOSEN, REJECTED), 0.554355),
        (preference.dpo(REJECTED, CHOSEN), 0.854355),
        (preference.dpo(CHOSEN, REJECTED, smoothing=0.1), 0.584355),
        (preference.ipo(CHOSEN, REJECTED), 18.9225),
        (preference.simpo(CHOSEN, REJECTED), 0.474077),
        (preference.orpo(CHOSEN, REJECTED), 2.036209),
        (preference.kto(CHOSEN, torch.tensor([True]), torch.tensor([0.5])), 0.462570),
        (preference.kto(REJECTED, torch.tensor([False]), torch.tensor([0.5])), 0.462570),
    ],
)
def test_the_losses_are_the_literal_numbers(value: Tensor, expected: float) -> None:
    assert value.item() == pytest.approx(expected, abs=5e-7)


def test_the_margins_are_the_literal_numbers() -> None:
    assert preference.dpo_margin(CHOSEN, REJECTED).item() == pytest.approx(0.3)
    assert preference.ipo_margin(CHOSEN, REJECTED).item() == pytest.approx(0.65)
    assert preference.simpo_margin(CHOSEN, REJECTED).item() == pytest.approx(1.5)
    log_odds = [math.log(p / (1 - p)) for p in (math.exp(-2), math.exp(-2.75))]
    assert preference.orpo_margin(CHOSEN, REJECTED).item() == pytest.approx(log_odds[0] - log_odds[1])
    label, baseline = torch.tensor([False]), torch.tensor([0.5])
    assert preference.kto_margin(REJECTED, label, baseline).item() == pytest.approx(0.15)


def test_a_policy_that_is_its_reference_loses_log_2_and_its_half_in_kto() -> None:
    chosen, rejected = side(-7, -7, 3), side(-90, -90, 41)
    for smoothing in (0.0, 0.2):
        assert preference.dpo(chosen, rejected, smoothing=smoothing).item() == pytest.approx(math.log(2))
    assert preference.ipo(chosen, rejected, beta=0.25).item() == pytest.approx(4.0)
    assert preference.kto(chosen, torch.tensor([True]), torch.tensor([0.0])).item() == pytest.approx(0.5)


PAIR_LOSSES: list[Callable[[Side, Side], Tensor]] = [
    preference.dpo,
    preference.ipo,
    preference.simpo,
    preference.orpo,
]


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_the_gradient_raises_the_chosen_answer_and_lowers_the_rejected_one(
    loss: Callable[[Side, Side], Tensor],
) -> None:
    policies = [one.policy.clone().requires_grad_() for one in (CHOSEN, REJECTED)]
    sides = [one._replace(policy=policy) for one, policy in zip((CHOSEN, REJECTED), policies, strict=True)]
    up, down = torch.autograd.grad(loss(*sides).sum(), policies)
    assert up < 0 < down
    assert torch.autograd.gradcheck(lambda a, b: loss(CHOSEN._replace(policy=a), REJECTED._replace(policy=b)), policies)


def test_the_gradients_of_dpo_are_opposite() -> None:
    policies = [one.policy.clone().requires_grad_() for one in (CHOSEN, REJECTED)]
    loss = preference.dpo(CHOSEN._replace(policy=policies[0]), REJECTED._replace(policy=policies[1]))
    up, down = torch.autograd.grad(loss.sum(), policies)
    assert up.item() == pytest.approx(-0.1 / (1 + math.exp(0.3)))
    assert down.item() == pytest.approx(-up.item())


@pytest.mark.parametrize("loss", [preference.simpo, preference.orpo])
def test_a_loss_without_a_reference_reads_none(loss: Callable[[Side, Side], Tensor]) -> None:
    nothing = torch.tensor([math.nan], dtype=torch.float64)
    sides = (one._replace(reference=nothing) for one in (CHOSEN, REJECTED))
    assert torch.equal(loss(*sides), loss(CHOSEN, REJECTED))


def test_the_odds_of_a_certain_answer_are_finite_in_value_and_gradient() -> None:
    policy = torch.tensor([0.0, -1e-9, -3.0], requires_grad=True)
    tokens = torch.full((3,), 5.0)
    loss = preference.orpo(Side(policy, policy, tokens), Side(policy - 1, policy, tokens))
    (slope,) = torch.autograd.grad(loss.sum(), policy)
    assert bool(loss.isfinite().all() and slope.isfinite().all())


def test_smoothing_is_the_share_of_pairs_whose_sides_change_places() -> None:
    expected = 0.7 * preference.dpo(CHOSEN, REJECTED) + 0.3 * preference.dpo(REJECTED, CHOSEN)
    torch.testing.assert_close(preference.dpo(CHOSEN, REJECTED, smoothing=0.3), expected)
