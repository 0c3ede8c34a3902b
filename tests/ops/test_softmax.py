"""Losses that share a softmax: each alone and all together, beside their definitions by autograd."""

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.ops.test_divergence import double, law, pairs
from torch import Tensor

from potstill.ops.coarse import CoarseDistribution, coarsen
from potstill.ops.divergence import acceptance_nll, cross_entropy, forward_kl, jsd, total_variation
from potstill.ops.row_loss import CrossEntropyRows, DivergenceRows, Masked, RowLoss, Tangent, Weighted, WhereArgmaxIs
from potstill.ops.softmax import Softmax, combine_slopes, get_slope

ROWS, VOCABULARY = 5, 7
KL = DivergenceRows()
LOSSES = {
    "cross-entropy": CrossEntropyRows(),
    "forward KL": KL,
    "total variation": DivergenceRows(total_variation),
    "acceptance": DivergenceRows(acceptance_nll),
    "forward KL to another": DivergenceRows(teacher="other"),
    "coarse KL": DivergenceRows(teacher="part"),
    "coarse KL where kept": Masked(DivergenceRows(teacher="part"), "kept"),
    "weighted": Weighted(KL, "weights"),
    "agreeing": WhereArgmaxIs(KL, "teacher"),
    "kept": Masked(KL, "kept"),
    "tangent": Tangent("tangent"),
    "weighted where kept": Weighted(Masked(CrossEntropyRows(), "kept"), "weights"),
}
SETS = [*[(name,) for name in LOSSES], *combinations(LOSSES, 2), tuple(LOSSES)]


def told(seed: int = 1) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Logits, what is said of them, targets; the teacher agrees with the target of some rows.

    `part` is known by up to three tokens, some rows by fewer, and two classes; its numbers sum to 1 only nearly.
    """
    generator = torch.Generator().manual_seed(seed)
    logits, teacher, other = (3 * torch.randn(ROWS, VOCABULARY, generator=generator).double() for _ in range(3))
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    targets[:2] = teacher[:2].argmax(-1)
    targets[2] = (teacher[2].argmax() + 1) % VOCABULARY
    part = coarsen(other, 3, torch.eye(2).double()[torch.arange(VOCABULARY) % 2], mass=0.8)
    said = {
        "teacher": teacher,
        "part": replace(part, log_p=part.log_p + 0.01),
        "other": other,
        "weights": torch.tensor([2.0, 0.0, -1.5, 0.3, 1.0]).double(),
        "kept": torch.tensor([True, False, True, True, False]),
        "tangent": torch.randn(ROWS, 3, generator=generator).double(),
    }
    return logits, said, targets


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_values_and_the_derivative_of_any_sum_are_those_of_the_definitions(names: tuple[str, ...]) -> None:
    logits, said, targets = told()
    losses: list[RowLoss] = [LOSSES[name] for name in names]
    mix = [0.7, -0.2, 1.0, 0.3, 2.0, 0.1, 0.6, 1.5, 0.4, 0.9, -0.6, 1.1][: len(losses)]
    leaf = logits.clone().requires_grad_()
    expected = [loss(leaf, said, targets) for loss in losses]
    (by_autograd,) = torch.autograd.grad(sum(w * v.sum() for w, v in zip(mix, expected, strict=True)), leaf)
    softmax = Softmax(logits)
    slopes = [get_slope(loss, softmax, said, targets) for loss in losses]
    found = [slope for slope in slopes if slope is not None]
    assert len(found) == len(losses)
    for slope, value in zip(found, expected, strict=True):
        torch.testing.assert_close(slope.values, value.detach())
    torch.testing.assert_close(combine_slopes(softmax, list(zip(mix, found, strict=True))), by_autograd)


def mixture(teacher: Tensor, student: Tensor, targets: Tensor, hard: float, soft: float) -> tuple[Tensor, ...]:
    """Cross-entropy, forward KL and the derivative of their weighted sum, from one softmax."""
    softmax, said = Softmax(student), {"teacher": teacher}
    slopes = [get_slope(loss, softmax, said, targets) for loss in (CrossEntropyRows(), KL)]
    first, second = (slope for slope in slopes if slope is not None)
    return first.values, second.values, combine_slopes(softmax, [(hard, first), (soft, second)])


@law
@given(logits=pairs(), data=st.data())
def test_the_derivative_of_cross_entropy_is_the_one_of_autograd(
    logits: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    student = logits[1]
    targets = torch.tensor([data.draw(st.integers(0, student.shape[1] - 1)) for _ in student])
    before = student.clone()
    values, gradient = CrossEntropyRows().values_and_gradient(student, {}, targets)
    assert torch.equal(student, before)
    expected = cross_entropy(student.requires_grad_(), targets)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-9, atol=1e-12)


@law
@given(logits=pairs(), data=st.data(), hard=st.sampled_from([0.0, 0.3, 2.0]), soft=st.sampled_from([0.0, 0.7, 1.0]))
def test_the_mixture_is_its_two_parts_and_its_derivative_theirs(
    logits: tuple[Tensor, Tensor], data: st.DataObject, hard: float, soft: float
) -> None:
    teacher, student = logits
    targets = torch.tensor(
        data.draw(st.lists(st.integers(0, student.shape[1] - 1), min_size=len(student), max_size=len(student)))
    )
    student.requires_grad_()
    expected = cross_entropy(student, targets), forward_kl(teacher, student)
    (gradient,) = torch.autograd.grad((hard * expected[0] + soft * expected[1]).sum(), student)
    found = mixture(teacher, student.detach().clone(), targets, hard, soft)
    torch.testing.assert_close(found, (expected[0].detach(), expected[1].detach(), gradient), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_row_of_no_weight_is_zero_whatever_is_said_of_it(wrong: float) -> None:
    logits, said, targets = told()
    said["teacher"][1, 3] = said["part"].log_p[1, 0] = wrong
    for loss in (Masked(KL, "kept"), Weighted(KL, "weights"), Masked(DivergenceRows(teacher="part"), "kept")):
        softmax = Softmax(logits)
        slopes = [get_slope(one, softmax, said, targets) for one in (loss, CrossEntropyRows())]
        pairs = [(1.0, slope) for slope in slopes if slope is not None]
        assert pairs[0][1].values[1] == 0
        alone = CrossEntropyRows().values_and_gradient(logits, said, targets)[1]
        torch.testing.assert_close(combine_slopes(softmax, pairs)[1], alone[1])


def test_a_teacher_that_says_no_number_is_not_silenced() -> None:
    logits, said, targets = told()
    nan = replace(said["part"], log_p=said["part"].log_p.clone())
    nan.log_p[0, 0] = math.nan
    for teacher in (nan, torch.full_like(logits, math.nan)):
        slope = get_slope(KL, Softmax(logits), {"teacher": teacher}, targets)
        assert slope is not None
        assert slope.values[0].isnan()


def test_what_is_said_in_another_precision_is_read_in_the_students() -> None:
    logits, said, targets = told()
    for name in ("part", "tangent"):
        loss: Any = DivergenceRows(teacher=name) if name == "part" else Tangent(name)
        slope = get_slope(loss, Softmax(logits.float()), said, targets)
        assert slope is not None
        torch.testing.assert_close(slope.values.double(), loss(logits, said, targets), rtol=1e-5, atol=1e-5)


def test_the_mixture_takes_tokens_that_are_masked_on_both_sides() -> None:
    teacher, student = double([[1.0, 2.0, -math.inf]]), double([[0.5, 0.0, -math.inf]])
    values = mixture(teacher, student, torch.tensor([1]), 0.5, 0.5)
    whole = mixture(teacher[:, :2], student[:, :2], torch.tensor([1]), 0.5, 0.5)
    torch.testing.assert_close(values[:2], whole[:2])
    torch.testing.assert_close(values[2][:, :2], whole[2])
    assert values[2].isfinite().all()


def test_a_class_of_which_the_student_gives_nothing_leaves_values_and_derivatives_finite() -> None:
    teacher = CoarseDistribution(
        torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([[0.5]]).log(), torch.ones(3, 1)
    )
    softmax = Softmax(torch.tensor([[0.0, -1e4, -1e4]]))
    slope = get_slope(KL, softmax, {"teacher": teacher}, torch.tensor([0]))
    assert slope is not None
    assert slope.values.isfinite().all()
    torch.testing.assert_close(combine_slopes(softmax, [(1.0, slope)]), torch.tensor([[0.5, 0.0, 0.0]]))


def test_a_derivative_of_another_form_is_not_shared() -> None:
    logits, said, targets = told()
    softmax = Softmax(logits)
    hot, bent = DivergenceRows(temperature=2.0), DivergenceRows(jsd)
    for loss in (hot, bent, Masked(hot, "kept"), Weighted(bent, "weights"), WhereArgmaxIs(bent, "teacher")):
        assert get_slope(loss, softmax, said, targets) is None
    assert "q" not in vars(softmax)  # nothing was computed for it
