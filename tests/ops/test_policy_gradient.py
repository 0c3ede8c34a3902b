"""The clipped policy gradient: numbers by hand, its definition by autograd, and the row loss in chunks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from potstill.ops import policy_gradient
from potstill.ops.fused import sum_row_losses, sum_row_losses_densely
from potstill.ops.policy_gradient import Clip, PolicyRows, TargetStatistic, estimate_kl, find_clipped, policy_loss
from potstill.ops.row_loss import AtTemperature, Weighted

CLIP = Clip(0.2, 0.28)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_value_is_the_smaller_gain_and_the_clip_takes_the_gradient() -> None:
    ratio, advantages = double(1.0, 1.5, 1.5, 0.5, 0.5, 1.25), double(2, 2, -2, 2, -2, 2)
    log_q = ratio.log().requires_grad_()
    values = policy_loss(log_q, torch.zeros(6).double(), advantages, CLIP)
    assert values.tolist() == pytest.approx([-2, -2.56, 3, -1, 1.6, -2.5])
    (slope,) = torch.autograd.grad(values.sum(), log_q)
    assert slope.tolist() == pytest.approx([-2, 0, 3, -1, 0, -2.5])
    clipped = find_clipped(log_q.detach(), torch.zeros(6).double(), advantages, CLIP)
    assert clipped.tolist() == [False, True, False, False, True, False]


def test_the_estimate_of_the_kl_is_zero_at_the_reference_and_above_it_elsewhere() -> None:
    log_q, log_p = double(-1.0, -2.0, -0.5), double(-1.0, -1.0, -1.5)
    assert estimate_kl(log_q, log_p).tolist() == pytest.approx([0, math.e - 2, math.exp(-1)])


def test_over_the_samples_of_a_policy_the_estimate_is_its_kl() -> None:
    q, p = torch.randn(2, 7, dtype=torch.float64).softmax(-1)
    exact = (q * (q / p).log()).sum()
    torch.testing.assert_close((q * estimate_kl(q.log(), p.log())).sum(), exact)


class Case:
    """Seven rows of eleven tokens behind a head, with inputs for which some ratios are clipped."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.rows, self.weight = (torch.randn(*shape).double().requires_grad_() for shape in ((7, 5), (11, 5)))
        self.targets = torch.randint(0, 11, (7,))
        log_q = self.read_log_q(1.0).detach()
        self.inputs = {
            "A": double(1.0, -0.5, 0.0, 2.0, -1.0, 0.7, -0.2),
            "old": log_q + double(0.0, 0.6, 0.5, -0.9, 0.1, 0.05, -0.3),
            "ref": log_q + torch.randn(7).double(),
            "w": torch.rand(7).double(),
        }

    def read_log_q(self, temperature: float) -> Tensor:
        return -cross_entropy(self.rows @ self.weight.mT / temperature, self.targets, reduction="none")

    def compare(self, loss: Any, expected: Tensor) -> None:
        """Value and both gradients of the row loss, densely and in chunks, beside those of `expected`."""
        literal = torch.autograd.grad(expected, (self.rows, self.weight), retain_graph=True)
        frozen = {name: lambda a, b, x=x: x[a:b] for name, x in self.inputs.items()}
        head = (self.weight, None, 1.0, None)
        (dense,) = sum_row_losses_densely([loss], self.rows, head, targets=self.targets, frozen=frozen)
        (chunked,) = sum_row_losses([loss], self.rows, head, targets=self.targets, frozen=frozen, mix=[1.0], chunk=3)
        for found in (dense, chunked):
            torch.testing.assert_close(found, expected)
            for gradient, other in zip(torch.autograd.grad(found, (self.rows, self.weight)), literal, strict=True):
                torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("reference", [None, "ref"])
def test_the_row_loss_is_the_definition_in_value_and_gradient(
    old: str | None, reference: str | None, temperature: float
) -> None:
    case = Case()
    log_q = case.read_log_q(temperature)
    ratio = (log_q - (log_q.detach() if old is None else case.inputs["old"])).exp()
    clipped = ratio.clamp(0.8, 1.28)
    expected = -torch.minimum(ratio * case.inputs["A"], clipped * case.inputs["A"])
    if reference is not None:
        log_ratio = case.inputs["ref"] - log_q
        expected = expected + 0.3 * (log_ratio.exp() - log_ratio - 1)
    loss: Any = Weighted(PolicyRows(advantages="A", old=old, reference=reference, clip=CLIP, kl=0.3), "w")
    case.compare(loss if temperature == 1 else AtTemperature(loss, temperature), (expected * case.inputs["w"]).sum())


def test_the_first_update_needs_no_old_log_probabilities() -> None:
    case = Case()
    case.inputs["old"] = case.read_log_q(1.0).detach()
    case.compare(PolicyRows(advantages="A", old="old"), case_sum(case, PolicyRows(advantages="A")))


def case_sum(case: Case, loss: PolicyRows) -> Tensor:
    return loss(case.rows @ case.weight.mT, case.inputs, case.targets).sum()


def test_a_statistic_sees_the_log_probability_of_each_target_and_has_no_gradient() -> None:
    case = Case()
    logits = case.rows @ case.weight.mT
    gap = TargetStatistic(lambda log_q, inputs: (log_q - inputs["old"]).abs())
    found = gap(logits, case.inputs, case.targets)
    assert found.tolist() == pytest.approx([0.0, 0.6, 0.5, 0.9, 0.1, 0.05, 0.3])
    assert not found.requires_grad
    expected = found.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_gradient, "cross_entropy", None)  # the one softmax of the loss serves both
        losses, head = [PolicyRows(advantages="A"), gap], (case.weight, None, 1.0, None)
        frozen = {name: lambda start, stop, x=x: x[start:stop] for name, x in case.inputs.items()}
        sums = sum_row_losses(losses, case.rows, head, targets=case.targets, frozen=frozen, mix=[1.0, 0.0])
    torch.testing.assert_close(sums[1], expected)
