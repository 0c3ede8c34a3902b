"""What is known of a distribution in part: bounds, its minimum, and the derivative."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.ops.coarse import (
    CoarseDistribution,
    coarse_divergence,
    coarse_divergence_with_gradient,
    coarsen,
    concatenate,
    token_log_prob,
)
from potstill.ops.divergence import (
    DIVERGENCES,
    forward_kl,
    get_facts,
    jsd,
    reverse_kl,
)
from potstill.ops.divergence_gradient import forward_kl_with_gradient
from potstill.ops.fused import sum_row_losses, sum_row_losses_densely
from potstill.ops.row_loss import DivergenceRows

F_DIVERGENCES = {name: d for name, d in DIVERGENCES.items() if get_facts(d).is_f_divergence}
law = settings(max_examples=40, derandomize=True)
each = pytest.mark.parametrize("divergence", F_DIVERGENCES.values(), ids=F_DIVERGENCES)


def classes(v: int, c: int) -> Tensor:
    """Token v in class v mod c."""
    return torch.eye(c, dtype=torch.float64)[torch.arange(v) % c]


def logits(n: int, v: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(n, v, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def by_autograd(function: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    values = function(student)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def test_a_hand_written_distribution_has_the_buckets_one_would_write() -> None:
    p = torch.tensor([[0.4, 0.05, 0.3, 0.2, 0.05]], dtype=torch.float64)
    found = coarsen(p.log(), 2, classes(5, 2))
    assert found.ids.tolist() == [[0, 2]]
    torch.testing.assert_close(found.buckets.exp(), torch.tensor([[0.4, 0.3, 0.05, 0.25]], dtype=torch.float64))
    few = coarsen(p.log(), 4, classes(5, 1), mass=0.65)
    torch.testing.assert_close(few.buckets.exp(), torch.tensor([[0.4, 0.3, 0, 0, 0.3]], dtype=torch.float64))


def test_a_token_without_a_bucket_has_an_equal_share_of_its_class() -> None:
    p = torch.tensor([[0.4, 0.05, 0.3, 0.2, 0.05]] * 5, dtype=torch.float64)
    found = token_log_prob(coarsen(p.log(), 2, classes(5, 2)), torch.arange(5)).exp()  # 0.05 of 4, 0.25 of 1 and 3
    torch.testing.assert_close(found, torch.tensor([0.4, 0.125, 0.3, 0.125, 0.05], dtype=torch.float64))
    few = coarsen(p.log(), 4, classes(5, 1), mass=0.65)
    torch.testing.assert_close(token_log_prob(few, torch.arange(5)).exp()[1:3], torch.tensor([0.1, 0.3]).double())


@law
@given(st.integers(0, 9), st.integers(1, 12), st.integers(1, 4))
def test_the_chances_of_all_tokens_sum_to_one(seed: int, k: int, c: int) -> None:
    known = coarsen(logits(1, 12, seed=seed), k, classes(12, c))
    rows = known.select_rows(torch.zeros(1, dtype=torch.long))
    total = sum(float(token_log_prob(rows, torch.tensor([token])).exp()) for token in range(12))
    assert total == pytest.approx(1, rel=1e-9)


@each
def test_a_part_is_never_farther_than_the_whole_and_nearer_the_less_is_known(
    divergence: Callable[[Tensor, Tensor], Tensor],
) -> None:
    teacher, student = logits(30, 12), logits(30, 12, seed=1)
    before = torch.zeros(30, dtype=torch.float64)
    for k, c in ((1, 1), (3, 1), (3, 2), (3, 4), (5, 4), (12, 4)):
        now = coarse_divergence(divergence, coarsen(teacher, k, classes(12, c)), student)
        assert (now >= before - 1e-12).all()
        before = now
    torch.testing.assert_close(before, divergence(teacher, student), rtol=1e-9, atol=1e-12)


@each
def test_all_tokens_known_is_the_whole_in_value_and_gradient(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
    teacher, student = logits(9, 7), logits(9, 7, seed=1)
    known = coarsen(teacher, 7, classes(7, 3))
    expected = by_autograd(partial(divergence, teacher), student)
    found = DivergenceRows(divergence).values_and_gradient(
        student, {"teacher": known}, torch.zeros(9, dtype=torch.long)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@each
def test_all_tokens_of_a_teacher_that_is_sure_are_known_too(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
    teacher, student = torch.tensor([[30.0, 0.0, -5.0, -9.0, -12.0, -20.0]]), torch.zeros(1, 6)
    known = coarsen(teacher, 6, torch.ones(6, 1))
    assert not known.log_p.isneginf().any()
    torch.testing.assert_close(coarse_divergence(divergence, known, student), divergence(teacher, student))


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, partial(jsd, beta=0.3)])
def test_the_teacher_is_a_minimum_and_a_renormalised_part_has_another(
    divergence: Callable[[Tensor, Tensor], Tensor],
) -> None:
    teacher = logits(6, 10)
    known = coarsen(teacher, 3, classes(10, 1))
    values, gradient = by_autograd(partial(coarse_divergence, divergence, known), teacher)
    assert values.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-9

    def truncated(student: Tensor) -> Tensor:
        return divergence(known.log_p.log_softmax(-1), student.gather(-1, known.ids).log_softmax(-1)) + (
            student.log_softmax(-1).gather(-1, known.ids).logsumexp(-1).neg()
        )

    assert by_autograd(truncated, teacher)[1].abs().max() > 1e-3


@law
@given(
    n=st.integers(1, 5),
    v=st.integers(1, 9),
    k=st.integers(1, 9),
    c=st.integers(1, 4),
    mass=st.sampled_from([0.5, 0.9, 0.999, 1.0]),
    tau=st.sampled_from([0.5, 1.0, 2.0]),
    name=st.sampled_from(sorted(F_DIVERGENCES)),
    seed=st.integers(0, 99),
)
def test_the_derivative_is_that_of_the_definition(
    n: int, v: int, k: int, c: int, mass: float, tau: float, name: str, seed: int
) -> None:
    teacher, student = logits(n, v, seed=seed), logits(n, v, seed=seed + 100)
    frozen = {"teacher": coarsen(teacher / tau, k, classes(v, c), mass=mass)}
    loss, targets = DivergenceRows(DIVERGENCES[name], temperature=tau), torch.zeros(n, dtype=torch.long)
    expected = by_autograd(lambda z: loss(z, frozen, targets), student)
    torch.testing.assert_close(loss.values_and_gradient(student, frozen, targets), expected, rtol=1e-8, atol=1e-10)


def test_a_tail_that_is_tiny_keeps_its_digits() -> None:
    teacher = torch.tensor([[0.0, -30.0, -31.0]])
    student = torch.tensor([[0.0, -25.0, -40.0]])
    known = coarsen(teacher, 1, torch.ones(3, 1))
    values, gradient = coarse_divergence_with_gradient(forward_kl_with_gradient, known, student)
    wide = coarse_divergence(forward_kl, coarsen(teacher.double(), 1, torch.ones(3, 1).double()), student.double())
    torch.testing.assert_close(known.log_rest.exp(), torch.tensor([[1.2800e-13]]), rtol=1e-3, atol=0)
    assert gradient.isfinite().all()
    assert abs(values.item() - wide.item()) < 1e-6


@pytest.mark.parametrize("gap", [80.0, 95.0, 99.0, 120.0, 300.0])
def test_a_student_that_is_very_sure_has_a_finite_loss_and_gradient(gap: float) -> None:
    teacher, student = torch.zeros(1, 5), torch.tensor([[gap, 0.0, 0.0, 0.0, 0.0]])
    known = coarsen(teacher, 1, torch.eye(5)[:, :2] + torch.tensor([0.0, 1.0]) * (torch.arange(5) > 1)[:, None])
    values, gradient = coarse_divergence_with_gradient(forward_kl_with_gradient, known, student)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


def test_parts_of_several_widths_are_joined() -> None:
    members, rows = classes(8, 2), logits(5, 8)
    whole = coarsen(rows, 4, members, mass=0.8)
    parts = concatenate([coarsen(rows[:2], 1, members), coarsen(rows[2:], 4, members, mass=0.8)])
    assert parts.ids.shape == (5, 4)
    student = logits(5, 8, seed=3)
    torch.testing.assert_close(
        coarse_divergence(forward_kl, parts, student)[2:],
        coarse_divergence(forward_kl, whole, student)[2:],
        rtol=1e-12,
        atol=0,
    )
    assert len(parts[1:3]) == 2


def test_the_fused_sum_takes_a_teacher_that_is_known_in_part() -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(7, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(6, 3, dtype=torch.float64, generator=generator).requires_grad_()
    known: CoarseDistribution = coarsen(logits(7, 6), 2, classes(6, 2))
    frozen = {"teacher": lambda a, b: known[a:b]}
    targets = torch.zeros(7, dtype=torch.long)
    found = []
    for form in (sum_row_losses_densely, partial(sum_row_losses, mix=[1.0], chunk=3)):
        (value,) = form([DivergenceRows()], rows, (weight, None, 1.0, None), targets=targets, frozen=frozen)
        found.append((value, *torch.autograd.grad(value, (rows, weight))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
