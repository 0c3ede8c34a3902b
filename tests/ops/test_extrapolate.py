"""AlignDistil's target: golden numbers of the released code, and the laws of the extrapolation."""

import pytest
import torch
from torch import Tensor

from potstill.ops.divergence import forward_kl, log_softmax, reverse_kl, total_variation
from potstill.ops.extrapolate import ExtrapolationRows, target

PLUS = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
MINUS = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64)
POLICY = torch.tensor([[1.0, 0.5, -1.0]], dtype=torch.float64)
NO_TARGETS = torch.zeros(1, dtype=torch.long)


def logits(*, rows: int = 6, tokens: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(rows, tokens, generator=generator, dtype=torch.float64) for _ in range(3))
    return a, b, c


def test_the_numbers_are_the_golden_ones() -> None:
    log_p, alpha = target(PLUS, MINUS)
    assert (2 * total_variation(PLUS, MINUS)).item() == pytest.approx(1.198133, abs=1e-6)
    assert alpha.item() == pytest.approx(11.982325, abs=1e-6)
    assert reverse_kl(log_p, POLICY).item() == pytest.approx(14.424001, abs=1e-6)
    loss = ExtrapolationRows()(POLICY, {"plus": PLUS, "minus": MINUS}, NO_TARGETS)
    assert loss.item() == pytest.approx(0.120377, abs=1e-6)


def test_the_official_form_without_a_half_is_this_one_with_twice_the_ratio() -> None:
    gap = (PLUS.softmax(-1) - MINUS.softmax(-1)).abs().sum(-1)
    alpha = 10 * gap + 1e-3
    official = torch.log_softmax(PLUS + alpha[:, None] * (PLUS - MINUS), -1)
    log_p, found = target(PLUS, MINUS, ratio=20.0)
    torch.testing.assert_close(found, alpha)
    torch.testing.assert_close(log_p, official)


def test_equal_policies_are_their_own_target_with_the_least_alpha() -> None:
    plus, _, student = logits()
    log_p, alpha = target(plus, plus)
    torch.testing.assert_close(log_p, log_softmax(plus))
    torch.testing.assert_close(alpha, torch.full_like(alpha, 1e-3))
    loss = ExtrapolationRows()(student, {"plus": plus, "minus": plus}, NO_TARGETS.expand(6))
    torch.testing.assert_close(loss, 0.1 / 1e-3 * reverse_kl(plus, student))


@pytest.mark.parametrize("contrast", [True, False])
def test_a_policy_at_its_target_has_no_loss_and_no_gradient(contrast: bool) -> None:
    plus, minus, _ = logits()
    log_p, _ = target(plus, minus, contrast=contrast)
    loss = ExtrapolationRows(contrast=contrast)
    values, gradient = loss.values_and_gradient(log_p + 3, {"plus": plus, "minus": minus}, NO_TARGETS.expand(6))
    assert values.abs().max() < 1e-9
    assert gradient.abs().max() < 1e-9


def test_a_constant_added_to_a_row_changes_nothing() -> None:
    plus, minus, student = logits()
    shift = torch.randn(6, 1, dtype=torch.float64)
    loss = ExtrapolationRows()
    expected = loss(student, {"plus": plus, "minus": minus}, NO_TARGETS.expand(6))
    shifted = loss(student - shift, {"plus": plus + shift, "minus": minus - 2 * shift}, NO_TARGETS.expand(6))
    torch.testing.assert_close(shifted, expected)


def test_alpha_lies_between_the_least_and_the_ratio() -> None:
    plus, minus, _ = logits(rows=200)
    _, alpha = target(10 * plus, 10 * minus, ratio=5.0, epsilon=0.25)
    assert 0.25 < alpha.min() < 1.5
    assert 4.5 < alpha.max() <= 5.25


def test_uniform_minus_sharpens_plus() -> None:
    plus, _, _ = logits()
    log_p, alpha = target(plus, torch.zeros_like(plus))
    torch.testing.assert_close(log_p, log_softmax((1 + alpha[:, None]) * plus))


def test_without_a_ratio_alpha_is_constant() -> None:
    plus, minus, student = logits()
    log_p, alpha = target(plus, minus, ratio=0.0, epsilon=2.0)
    assert alpha.tolist() == [2.0] * 6
    torch.testing.assert_close(log_p, log_softmax(3 * plus - 2 * minus))
    loss = ExtrapolationRows(ratio=0.0, epsilon=2.0)(student, {"plus": plus, "minus": minus}, NO_TARGETS.expand(6))
    torch.testing.assert_close(loss, 0.1 / 2 * reverse_kl(log_p, student))


def test_the_theorem_holds_at_each_position() -> None:
    """E_q[beta log(p+ / p_ref)] - b KL(q || p_ref) + b KL(q || p*) does not depend on q."""
    plus, reference, _ = logits()
    beta, b = 0.1, 0.04
    log_p, alpha = target(plus, reference, ratio=0.0, epsilon=beta / b, contrast=False)
    assert alpha.tolist() == pytest.approx([2.5] * 6)
    constants = []
    for seed in range(1, 5):
        q = logits(seed=seed)[2]
        reward = beta * (q.softmax(-1) * (log_softmax(plus) - log_softmax(reference))).sum(-1)
        constants.append(reward - b * forward_kl(q, reference) + b * reverse_kl(log_p, q))
    for constant in constants[1:]:
        torch.testing.assert_close(constant, constants[0])


@pytest.mark.parametrize("loss", [ExtrapolationRows(), ExtrapolationRows(ratio=0.0, epsilon=2.0, contrast=False)])
def test_the_gradient_is_that_of_the_value_for_the_student_alone(loss: ExtrapolationRows) -> None:
    plus, minus, student = (x.requires_grad_() for x in logits())
    frozen = {"plus": plus.detach(), "minus": minus.detach()}
    (expected,) = torch.autograd.grad(loss(student, frozen, NO_TARGETS.expand(6)).sum(), student)
    values, gradient = loss.values_and_gradient(student.detach(), frozen, NO_TARGETS.expand(6))
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(values, loss(student.detach(), frozen, NO_TARGETS.expand(6)))
