"""Divergences: golden numbers, the literal definitions, and their laws."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.autograd import gradcheck

from potstill.ops import divergence as divergences
from potstill.ops.divergence import (
    DIVERGENCES,
    Divergence,
    acceptance_nll,
    adaptive_kl,
    apply_temperature,
    cross_entropy,
    forward_kl,
    get_facts,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from potstill.ops.divergence_gradient import WITH_GRADIENT

law = settings(max_examples=40, derandomize=True)

INF = math.inf
VARIANTS = {  # with other options than the defaults
    "jsd at 0.1": partial(jsd, beta=0.1),
    "jsd at 0.8": partial(jsd, beta=0.8),
    "skew_kl at 0.7": partial(skew_kl, skew=0.7),
    "skew_reverse_kl at 0.7": partial(skew_reverse_kl, skew=0.7),
    "adaptive_kl at 0.1": partial(adaptive_kl, tail=0.1),
}
EVERY = {**DIVERGENCES, **VARIANTS}
SMOOTH = {name: divergence for name, divergence in EVERY.items() if get_facts(divergence).has_full_gradient}

smooth = pytest.mark.parametrize("divergence", SMOOTH.values(), ids=SMOOTH)
every = pytest.mark.parametrize("divergence", EVERY.values(), ids=EVERY)


def double(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@st.composite
def pairs(draw: st.DrawFn, values: st.SearchStrategy[float] | None = None) -> tuple[Tensor, Tensor]:
    """(teacher, student) of one ragged shape, in eighths, so that ties are frequent."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    values = st.integers(-48, 48).map(lambda n: n / 8) if values is None else values
    draws = (draw(arrays(np.float64, shape, elements=values)) for _ in range(2))
    teacher, student = (torch.from_numpy(logits) for logits in draws)
    return teacher, student


# The definitions, literally: probabilities, loops over tokens, no logarithm of a sum of exponentials.


def probabilities(logits: Tensor) -> list[list[float]]:
    exponentials = np.exp(logits.numpy() - logits.numpy().max(-1, keepdims=True))
    return (exponentials / exponentials.sum(-1, keepdims=True)).tolist()


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def mix(weight: float, p: list[float], q: list[float]) -> list[float]:
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def literal_adaptive(p: list[float], q: list[float], tail: float) -> float:
    gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
    in_tail = [sum(b for b in p if b <= a) <= tail for a in p]
    if not sum(gaps):
        return 0.0
    share = sum(gap for gap, inside in zip(gaps, in_tail, strict=True) if inside) / sum(gaps)
    return (1 - share) * kl(p, q) + share * kl(q, p)


LITERAL: dict[str, tuple[Divergence, Callable[[list[float], list[float]], float]]] = {
    "forward_kl": (forward_kl, kl),
    "reverse_kl": (reverse_kl, lambda p, q: kl(q, p)),
    "jsd": (jsd, lambda p, q: 0.5 * kl(p, mix(0.5, p, q)) + 0.5 * kl(q, mix(0.5, p, q))),
    "jsd, a fifth of the teacher": (
        partial(jsd, beta=0.2),
        lambda p, q: 0.2 * kl(p, mix(0.2, p, q)) + 0.8 * kl(q, mix(0.2, p, q)),
    ),
    "skew_kl": (skew_kl, lambda p, q: kl(p, mix(0.1, p, q))),
    "skew_kl at 0.3": (partial(skew_kl, skew=0.3), lambda p, q: kl(p, mix(0.3, p, q))),
    "skew_reverse_kl": (skew_reverse_kl, lambda p, q: kl(q, mix(0.9, p, q))),
    "skew_reverse_kl at 0.3": (partial(skew_reverse_kl, skew=0.3), lambda p, q: kl(q, mix(0.7, p, q))),
    "adaptive_kl": (adaptive_kl, partial(literal_adaptive, tail=0.5)),
    "adaptive_kl, a tail of 0.2": (partial(adaptive_kl, tail=0.2), partial(literal_adaptive, tail=0.2)),
    "total_variation": (
        total_variation,
        lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    ),
    "acceptance_nll": (acceptance_nll, lambda p, q: -math.log(sum(map(min, p, q)))),
}


@pytest.mark.parametrize(("fast", "literal"), LITERAL.values(), ids=LITERAL)
@law
@given(logits=pairs(st.floats(-6, 6)))
def test_each_divergence_is_its_literal_definition(
    fast: Divergence, literal: Callable[[list[float], list[float]], float], logits: tuple[Tensor, Tensor]
) -> None:
    expected = [literal(p, q) for p, q in zip(*map(probabilities, logits), strict=True)]
    torch.testing.assert_close(fast(*logits), double(expected), rtol=1e-9, atol=1e-12)


GOLDEN = [
    (forward_kl, 0.541298, 0.135393),
    (reverse_kl, 0.496759, 0.127925),
    (jsd, 0.122788, 0.032421),
    (skew_kl, 0.413514, 0.107283),
    (skew_reverse_kl, 0.394580, 0.103790),
    (total_variation, 0.469636, 0.238525),
    (acceptance_nll, 0.634192, 0.272498),
    (adaptive_kl, 0.518675, 0.133089),
    (partial(jsd, beta=0.25), 0.095111, None),
    (partial(jsd, beta=0.75), 0.091417, None),
    (partial(adaptive_kl, tail=0.1), 0.540945, None),
]


@pytest.mark.parametrize(("divergence", "warm", "hot"), GOLDEN)
def test_each_divergence_gives_the_number_computed_by_hand(
    divergence: Divergence, warm: float, hot: float | None
) -> None:
    teacher, student = double([[2, 1, 0, -1]]), double([[0, 1, 0.5, -2]])
    assert divergence(teacher, student).item() == pytest.approx(warm, rel=1e-5, abs=6e-7)
    if hot is not None:
        assert divergence(teacher / 2, student / 2).item() == pytest.approx(hot, rel=1e-5, abs=6e-7)
        assert apply_temperature(divergence, 2.0)(teacher, student).item() == pytest.approx(4 * hot, rel=1e-5, abs=3e-6)


def test_the_table_names_each_divergence_by_its_own_name() -> None:
    assert {name: f.__name__ for name, f in DIVERGENCES.items()} == {name: name for name in DIVERGENCES}


@every
@law
@given(logits=pairs())
def test_a_divergence_is_never_negative_and_positive_where_the_distributions_differ(
    divergence: Divergence, logits: tuple[Tensor, Tensor]
) -> None:
    value = divergence(*logits)
    apart = (logits[0].softmax(-1) - logits[1].softmax(-1)).abs().amax(-1) > 1e-3
    assert (value > -1e-14).all()
    assert (value[apart] > 1e-9).all()


@every
@law
@given(logits=pairs())
def test_equal_distributions_give_zero_and_no_gradient(divergence: Divergence, logits: tuple[Tensor, Tensor]) -> None:
    student = logits[0].clone().requires_grad_()
    value = divergence(logits[0] + 3, student)
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.zeros_like(value), rtol=0, atol=1e-13)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-13)


@every
@law
@given(logits=pairs(), shift=st.floats(-50, 50))
def test_a_constant_added_to_the_logits_of_a_row_changes_nothing(
    divergence: Divergence, logits: tuple[Tensor, Tensor], shift: float
) -> None:
    teacher, student = logits
    assume(divergence not in (EVERY["adaptive_kl"], EVERY["adaptive_kl at 0.1"]) or _tail_is_clear(teacher))
    torch.testing.assert_close(
        divergence(teacher + shift, student - shift), divergence(teacher, student), rtol=1e-9, atol=1e-12
    )


@every
@law
@given(logits=pairs(), data=st.data())
def test_renaming_tokens_changes_nothing(
    divergence: Divergence, logits: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    teacher, student = logits
    assume(divergence not in (EVERY["adaptive_kl"], EVERY["adaptive_kl at 0.1"]) or _tail_is_clear(teacher))
    names = torch.tensor(data.draw(st.permutations(range(teacher.shape[1]))))
    torch.testing.assert_close(
        divergence(teacher[:, names], student[:, names]), divergence(teacher, student), rtol=1e-9, atol=1e-12
    )


def _tail_is_clear(teacher: Tensor) -> bool:
    """No cumulated probability is within rounding of the mass of a tail that is tested."""
    cumulated = teacher.softmax(-1).sort(-1).values.cumsum(-1)
    return all(bool(((cumulated - tail).abs() > 1e-9).all()) for tail in (0.1, 0.5))


@pytest.mark.parametrize("tail", [0.1, 0.5, 0.9])
def test_the_head_of_adaptive_kl_is_the_same_however_many_tokens_are_looked_at_first(
    tail: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = (torch.randn(8, 300, dtype=torch.float64).mul_(2) for _ in range(2))
    teacher[0] = 0  # of this row all are equally likely
    found = {}
    for few in (1, 3, divergences.HEAD_SIZE, 300):
        monkeypatch.setattr(divergences, "HEAD_SIZE", few)
        found[few] = adaptive_kl(teacher, student, tail=tail)
    literal = [
        literal_adaptive(p.tolist(), q.tolist(), tail)
        for p, q in zip(teacher.softmax(-1)[1:], student.softmax(-1)[1:], strict=True)
    ]
    for values in found.values():
        torch.testing.assert_close(values[1:], double(literal))
        assert torch.equal(values, found[300])


@every
@law
@given(logits=pairs())
def test_each_row_is_alone(divergence: Divergence, logits: tuple[Tensor, Tensor]) -> None:
    alone = [divergence(t[None], s[None]) for t, s in zip(*logits, strict=True)]
    torch.testing.assert_close(divergence(*logits), torch.cat(alone), rtol=1e-12, atol=1e-14)


@law
@given(logits=pairs(st.floats(-80, 80)))
def test_the_bounds_hold(logits: tuple[Tensor, Tensor]) -> None:
    slack = 1 + 1e-12
    assert (jsd(*logits) <= math.log(2) * slack).all()
    assert (total_variation(*logits) <= slack).all()
    assert (skew_kl(*logits) <= -math.log(0.1) * slack).all()
    assert (skew_reverse_kl(*logits) <= -math.log(0.1) * slack).all()


@law
@given(logits=pairs(), beta=st.floats(0, 1))
def test_exchanging_teacher_and_student_mirrors_jsd_and_leaves_total_variation(
    logits: tuple[Tensor, Tensor], beta: float
) -> None:
    teacher, student = logits
    torch.testing.assert_close(jsd(teacher, student), jsd(student, teacher), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        total_variation(teacher, student), total_variation(student, teacher), rtol=1e-12, atol=1e-15
    )
    if 0 < 1 - beta < 1:
        torch.testing.assert_close(
            jsd(teacher, student, beta=beta), jsd(student, teacher, beta=1 - beta), rtol=1e-8, atol=1e-14
        )


@law
@given(logits=pairs())
def test_the_ends_of_beta_and_skew_are_exactly_the_two_kls(logits: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(jsd(*logits, beta=0.0), forward_kl(*logits))
    assert torch.equal(jsd(*logits, beta=1.0), reverse_kl(*logits))
    assert torch.equal(skew_kl(*logits, skew=0.0), forward_kl(*logits))
    assert torch.equal(skew_reverse_kl(*logits, skew=0.0), reverse_kl(*logits))


@law
@given(logits=pairs())
def test_near_the_ends_jsd_over_its_share_comes_near_the_two_kls(logits: tuple[Tensor, Tensor]) -> None:
    share = 1e-6
    near_forward, near_reverse = jsd(*logits, beta=share) / share, jsd(*logits, beta=1 - share) / share
    torch.testing.assert_close(near_forward, forward_kl(*logits), rtol=0.1, atol=1e-3)
    torch.testing.assert_close(near_reverse, reverse_kl(*logits), rtol=0.1, atol=1e-3)


@law
@given(logits=pairs(), data=st.data())
def test_forward_kl_from_a_one_hot_teacher_is_cross_entropy(logits: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    student = logits[1]
    targets = torch.tensor([data.draw(st.integers(0, student.shape[1] - 1)) for _ in student])
    teacher = torch.full_like(student, -INF).scatter(1, targets[:, None], 0.0)
    expected = torch.nn.functional.cross_entropy(student, targets, reduction="none")
    torch.testing.assert_close(forward_kl(teacher, student), expected)
    torch.testing.assert_close(cross_entropy(student, targets), expected)


@smooth
def test_gradients_of_both_sides_are_finite_differences(divergence: Divergence) -> None:
    teacher, student = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(divergence, (teacher, student))


@smooth
def test_gradients_at_ties_are_finite_differences(divergence: Divergence) -> None:
    teacher = double([[0.5, -1, 2, 2], [1, 1, 1, 1]])
    student = teacher.clone().requires_grad_()
    assert gradcheck(lambda logits: divergence(teacher, logits), (student,))
    partly = double([[2, 1, 0, 0], [0, 1, 2, 3]]).requires_grad_()  # row 0: p = q for the last two tokens only
    swapped = double([[1, 2, 0, 0], [0, 1, 2, 3]])
    assert gradcheck(lambda logits: divergence(swapped, logits), (partly,))


def test_the_acceptance_is_what_total_variation_leaves_in_value_and_gradient() -> None:
    teacher, student = torch.randn(50, 9).double(), torch.randn(50, 9).double().requires_grad_()
    rejected, nll = total_variation(teacher, student), acceptance_nll(teacher, student)
    torch.testing.assert_close(nll, -torch.log1p(-rejected), rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (rejected, nll)]
    torch.testing.assert_close(gradients[1], gradients[0] / (1 - rejected.detach())[:, None], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", [total_variation, acceptance_nll])
def test_the_gradient_at_a_tie_is_the_middle_of_both_sides(divergence: Divergence) -> None:
    teacher, tie = double([[0, 0, -INF]]), double([[0, -INF, 0]])  # p = q = 1/2 for the first token alone

    def slope_at(step: float) -> Tensor:
        student = (tie + double([[step, 0, 0]])).requires_grad_()
        return torch.autograd.grad(divergence(teacher, student).sum(), student)[0]

    torch.testing.assert_close(slope_at(0.0), (slope_at(1e-7) + slope_at(-1e-7)) / 2, rtol=1e-5, atol=1e-6)
    assert (slope_at(1e-7) - slope_at(-1e-7)).abs().max() > 0.1


def test_the_weights_of_adaptive_kl_are_constants_of_its_gradient() -> None:
    teacher = torch.randn(4, 7, dtype=torch.float64)
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    forward, reverse = forward_kl(teacher, student), reverse_kl(teacher, student)
    head = ((adaptive_kl(teacher, student) - reverse) / (forward - reverse)).detach()
    (expected,) = torch.autograd.grad((head * forward + (1 - head) * reverse).sum(), student)
    (gradient,) = torch.autograd.grad(adaptive_kl(teacher, student).sum(), student)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)


def test_equally_likely_tokens_are_all_in_the_head_or_all_in_the_tail() -> None:
    teacher = double([[math.log(p) for p in (0.4, 0.2, 0.2, 0.2)]])  # a tail of 0.5 could hold two of the three
    student = double([[0.0, 1.0, 0.5, -0.5]])
    assert adaptive_kl(teacher, student).item() == pytest.approx(forward_kl(teacher, student).item())


@every
@law
@given(logits=pairs(), masked=st.integers(0, 8))
def test_tokens_masked_on_both_sides_are_as_good_as_absent(
    divergence: Divergence, logits: tuple[Tensor, Tensor], masked: int
) -> None:
    teacher, student = logits
    assume(teacher.shape[1] > 1)
    hole = torch.arange(teacher.shape[1]) == masked % teacher.shape[1]
    grown = [x.masked_fill(hole, -INF).requires_grad_() for x in (teacher, student)]
    cut = [x[:, ~hole].clone().requires_grad_() for x in (teacher, student)]
    values = divergence(*grown)
    torch.testing.assert_close(values, divergence(*cut), rtol=1e-9, atol=1e-13)
    gradients = torch.autograd.grad(values.sum(), grown)
    expected = torch.autograd.grad(divergence(*cut).sum(), cut)
    for gradient, without in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient[:, ~hole], without, rtol=1e-9, atol=1e-13)
        assert (gradient[:, hole] == 0).all()


FINITE_THOUGH_MASKED = [
    *(
        (name, side)
        for name in ("jsd", "skew_kl", "skew_reverse_kl", "total_variation", "acceptance_nll")
        for side in (0, 1)
    ),
    ("forward_kl", 0),
    ("reverse_kl", 1),
]


@pytest.mark.parametrize(("name", "side"), FINITE_THOUGH_MASKED)
def test_a_token_masked_on_one_side_leaves_finite_values_and_gradients(name: str, side: int) -> None:
    logits = [double([[2, 1, 0, -1]]), double([[0, 1, 0.5, -2]])]
    far = [x.clone() for x in logits]
    logits[side][0, 2], far[side][0, 2] = -INF, -60.0
    for x in (*logits, *far):
        x.requires_grad_()
    value, expected = DIVERGENCES[name](*logits), DIVERGENCES[name](*far)
    torch.testing.assert_close(value, expected)
    gradients = zip(torch.autograd.grad(value.sum(), logits), torch.autograd.grad(expected.sum(), far), strict=True)
    for gradient, near in gradients:
        torch.testing.assert_close(gradient, near)


@pytest.mark.parametrize(("name", "side"), [("forward_kl", 1), ("reverse_kl", 0), ("adaptive_kl", 0)])
def test_a_token_that_one_side_rules_out_and_the_other_needs_costs_infinitely_much(name: str, side: int) -> None:
    logits = [double([[2, 1, 0, -1]]), double([[0, 1, 0.5, -2]])]
    logits[side][0, 2] = -INF
    assert DIVERGENCES[name](*logits).item() == INF


@every
def test_huge_logits_neither_overflow_nor_lose_the_gradient(divergence: Divergence) -> None:
    teacher = torch.tensor([[1e4, 0.0, -1e4], [80.0, 0.0, -80.0]])
    student = torch.tensor([[0.0, 1e4, -1e4], [-80.0, 0.0, 80.0]], requires_grad=True)
    value = divergence(teacher, student)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every
def test_half_precision_logits_give_the_float32_value_of_those_logits(divergence: Divergence) -> None:
    teacher, student = (torch.randn(5, 33).bfloat16() for _ in range(2))
    value = divergence(teacher, student)
    assert value.dtype == torch.float32
    assert torch.equal(value, divergence(teacher.float(), student.float()))
    exact = divergence(teacher.double(), student.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


@every
def test_no_rows_give_no_values(divergence: Divergence) -> None:
    assert divergence(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@smooth
def test_temperature_divides_both_logits_and_its_square_multiplies(divergence: Divergence, temperature: float) -> None:
    teacher, student = (torch.randn(3, 6).bfloat16() for _ in range(2))
    expected = temperature**2 * divergence(teacher.float() / temperature, student.float() / temperature)
    assert torch.equal(apply_temperature(divergence, temperature)(teacher, student), expected)
    assert apply_temperature(divergence, 1.0) is divergence


def test_the_squared_temperature_keeps_the_scale_of_the_gradient() -> None:
    teacher, student = torch.randn(4, 9), torch.randn(4, 9)
    norms = []
    for temperature in (50.0, 100.0):
        logits = student.clone().requires_grad_()
        apply_temperature(forward_kl, temperature)(teacher, logits).sum().backward()
        assert logits.grad is not None
        norms.append(logits.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("divergence", WITH_GRADIENT, ids=lambda f: f.__name__)
@law
@given(logits=pairs(), masked=st.booleans())
def test_each_derivative_written_by_hand_is_the_one_of_autograd(
    divergence: Divergence, logits: tuple[Tensor, Tensor], masked: bool
) -> None:
    teacher, student = logits[0].clone(), logits[1].clone()
    if masked and teacher.shape[1] > 2:
        teacher[:, 0] = -INF
        student[:, 0], teacher[:, 1] = -INF, -INF
    before = teacher.clone(), student.clone()
    values, gradient = WITH_GRADIENT[divergence](teacher, student)
    assert torch.equal(teacher, before[0])
    assert torch.equal(student, before[1])
    expected = divergence(teacher, student.requires_grad_())
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-9, atol=1e-12)


def test_cross_entropy_ignores_no_target() -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(torch.zeros(1, 3), torch.tensor([-100]))


@pytest.mark.parametrize(
    ("divergence", "option", "values"),
    [
        (jsd, "beta", (-0.1, 1.1, math.nan)),
        (skew_kl, "skew", (-0.1, 1.0, math.nan)),
        (skew_reverse_kl, "skew", (-0.1, 1.0, math.nan)),
        (adaptive_kl, "tail", (0.0, 1.0, math.nan)),
    ],
)
def test_a_share_outside_its_range_is_refused(divergence: Divergence, option: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{option} = {value}"):
            divergence(torch.zeros(1, 2), torch.zeros(1, 2), **{option: value})


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, math.nan])
def test_a_temperature_that_cannot_divide_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature = {temperature}"):
        apply_temperature(forward_kl, temperature)
