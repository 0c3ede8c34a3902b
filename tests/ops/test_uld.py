"""Sorted probabilities compared without sorting, beside the definition that sorts."""

import unittest.mock

import pytest
import torch
from torch import Tensor

from potstill.ops.uld import (
    BIN_BITS,
    EXPONENTS,
    MIN_TALLY_WIDTH,
    ULDRows,
    is_bfloat16_valued,
    uld_by_bins,
    uld_by_sorting,
    uld_by_tally,
)


def probabilities(rows: int, tokens: int, spread: float, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, tokens, generator=generator)).to(dtype).softmax(-1)


def test_it_is_the_number_of_the_literature() -> None:
    teacher, student = torch.tensor([[2.0, 1, 0, -1, -3]]), torch.tensor([[0.0, 1, 0.5, -2]])
    for found in (
        uld_by_sorting(teacher.softmax(-1), student.softmax(-1)),
        uld_by_bins(teacher.softmax(-1), student.softmax(-1))[0],
        ULDRows()(student, {"teacher": teacher}, torch.zeros(1, dtype=torch.long)),
    ):
        torch.testing.assert_close(found, torch.tensor([0.317507]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("spreads", [(3.0, 3.0), (1.0, 3.0), (0.3, 0.1), (6.0, 2.0), (20.0, 0.1)])
@pytest.mark.parametrize("tokens", [(11, 9), (3, 200), (1000, 999), (49_152, 49_152), (262_144, 49_152)])
def test_on_rows_of_softmax_it_is_the_definition_to_a_hundred_thousandth(
    tokens: tuple[int, int], spreads: tuple[float, float]
) -> None:
    p, q = (probabilities(2, n, spread, i) for i, (n, spread) in enumerate(zip(tokens, spreads, strict=True)))
    torch.testing.assert_close(uld_by_bins(p, q)[0], uld_by_sorting(p, q), rtol=0, atol=1e-5)
    torch.testing.assert_close(uld_by_bins(p.float(), q.float())[0].double(), uld_by_sorting(p, q), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("tokens", [(40, 40), (1024, 1024), (50, 3000)])
def test_the_bound_holds_where_all_entries_cross_inside_bins(tokens: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (1 + 2**-BIN_BITS * torch.rand(1, n, generator=generator, dtype=torch.float64) for n in tokens)
    p, q = p / p.sum(), q / q.sum()
    below, exact = uld_by_bins(p, q)[0], uld_by_sorting(p, q)
    rounding = 2**-22
    assert exact - 2**-BIN_BITS - sum(tokens) * 2**-EXPONENTS - rounding <= below <= exact + rounding


def test_the_bound_is_needed() -> None:
    edge = 1 + 2.0**-BIN_BITS * torch.tensor([0.0, 0.999])
    p, q = torch.tensor([[1.0, 1.0]]) * edge.mean() / 8, edge[None] / 8
    exact = uld_by_sorting(p, q)
    assert uld_by_bins(p, q)[0] < 0.1 * exact
    assert exact < 2**-BIN_BITS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_entries_in_any_order_give_exactly_nothing(dtype: torch.dtype) -> None:
    p = probabilities(3, 777, 4.0, 1, dtype)
    q = torch.nn.functional.pad(p[:, torch.randperm(777)], (0, 20))
    values, slope = uld_by_bins(p, q)
    assert not values.any()
    assert not slope.any()


def test_it_is_symmetric_and_at_most_two() -> None:
    p, q = probabilities(5, 300, 8.0, 1), probabilities(5, 120, 0.1, 2)
    torch.testing.assert_close(uld_by_bins(p, q)[0], uld_by_bins(q, p)[0])
    certain, uniform = torch.eye(4)[:1], torch.full((1, 100_000), 1e-5)
    value = uld_by_bins(certain, uniform)[0].item()
    assert value == pytest.approx(2 - 2e-5, abs=1e-5)


def test_its_slope_is_that_of_the_definition() -> None:
    p, q = probabilities(4, 60, 3.0, 1), probabilities(4, 50, 2.0, 2).requires_grad_()
    (expected,) = torch.autograd.grad(uld_by_sorting(p, q).sum(), q)
    assert (uld_by_bins(p, q.detach())[1] == expected).float().mean() > 0.98, "but for entries that share a bin"


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_its_gradient_by_logits_is_that_of_its_value(tau: float) -> None:
    torch.manual_seed(0)
    told, logits = {"teacher": 3 * torch.randn(4, 60).double()}, (2 * torch.randn(4, 50)).double().requires_grad_()
    loss, nobody = ULDRows(temperature=tau), torch.zeros(4, dtype=torch.long)
    values, gradient = loss.values_and_gradient(logits.detach(), told, nobody)
    (expected,) = torch.autograd.grad(loss(logits, told, nobody).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    step = 1e-3 * torch.randn_like(logits)
    there, back = (loss((logits + sign * step).detach(), told, nobody) for sign in (1, -1))
    torch.testing.assert_close((gradient * step).sum(-1), (there - back) / 2, rtol=1e-3, atol=1e-7)
    assert torch.equal(values, loss(logits, told, nobody))


def halved(rows: int, tokens: int, spread: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, tokens, generator=generator)).bfloat16().float()


def test_logits_are_short_where_bfloat16_holds_them() -> None:
    assert is_bfloat16_valued(halved(2, 9, 3.0, 1))
    assert not is_bfloat16_valued(torch.tensor([[1.0, 1 + 2**-20]]))
    assert not is_bfloat16_valued(torch.ones(1, 2, dtype=torch.float64))
    assert not is_bfloat16_valued(torch.ones(0, 2))


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("spreads", [(3.0, 3.0), (6.0, 2.0), (20.0, 0.1)])
@pytest.mark.parametrize("tokens", [(11, 9), (3, 200), (2 * MIN_TALLY_WIDTH, 49_152)])
def test_numbers_that_are_counted_first_give_the_same(
    tokens: tuple[int, int], spreads: tuple[float, float], tau: float
) -> None:
    teacher, student = (halved(2, n, s, i) for i, (n, s) in enumerate(zip(tokens, spreads, strict=True)))
    teacher[:, 1] = -torch.inf
    values, slope = uld_by_tally(teacher, student, tau)
    p, q = ((logits.double() / tau).softmax(-1) for logits in (teacher, student))
    expected, slopes = uld_by_bins(p, q)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-5)
    assert (slope == slopes).double().mean() > 0.99, "but for entries that rounding puts on a bin's edge"


def test_equal_numbers_in_any_order_give_exactly_nothing() -> None:
    logits = halved(3, 777, 4.0, 1)
    values, slope = uld_by_tally(
        logits, torch.nn.functional.pad(logits[:, torch.randperm(777)], (0, 20), value=-torch.inf)
    )
    assert not values.any()
    assert not slope.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_wide_teacher_is_compared_by_its_numbers_where_these_are_few(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = (torch.randn(2, n).to(dtype).float() for n in (MIN_TALLY_WIDTH, 500))
    loss, nobody = ULDRows(), torch.zeros(2, dtype=torch.long)
    with unittest.mock.patch("potstill.ops.uld.uld_by_tally", wraps=uld_by_tally) as asked:
        by_tallies = loss.values_and_gradient(student, {"teacher": teacher}, nobody)
        assert asked.call_count == (dtype == torch.bfloat16)
        loss.values_and_gradient(student, {"teacher": teacher[:, 1:]}, nobody)
        assert asked.call_count == (dtype == torch.bfloat16), "not for fewer"
    monkeypatch.setattr("potstill.ops.uld.is_bfloat16_valued", lambda logits: False)
    by_entries = loss.values_and_gradient(student, {"teacher": teacher}, nobody)
    torch.testing.assert_close(by_tallies, by_entries, rtol=1e-4, atol=1e-6)
    monkeypatch.undo()
    logits = student.requires_grad_()
    loss(logits, {"teacher": teacher}, nobody).sum().backward()
    torch.testing.assert_close(logits.grad, by_tallies[1], rtol=1e-4, atol=1e-6)
