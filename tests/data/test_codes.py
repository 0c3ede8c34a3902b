"""Distributions as bytes: what comes back, how near it is, and how small."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.data.codes import CLASS_STEP, Format, decode, encode
from potstill.ops.coarse import coarse, coarsened
from potstill.ops.divergence import forward_kl, reverse_kl

law = settings(max_examples=40, derandomize=True)


def classes(v: int, c: int) -> Tensor:
    return torch.eye(c)[torch.arange(v) % c]


def logits(n: int, v: int, seed: int = 0) -> Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * 4


@law
@given(
    n=st.integers(1, 6),
    v=st.integers(1, 40),
    k=st.integers(1, 40),
    c=st.integers(1, 5),
    mass=st.sampled_from([0.3, 0.9, 1.0]),
    exact=st.booleans(),
    seed=st.integers(0, 50),
)
def test_rows_come_back_within_half_a_step_and_with_the_exact_tail(
    n: int, v: int, k: int, c: int, mass: float, exact: bool, seed: int
) -> None:
    how, members = Format(v, c, exact), classes(v, c)
    rows = coarsened(logits(n, v, seed), k, members, mass=mass)
    found = decode(encode(rows, how), members, how)
    known = ~rows.log_p.isneginf()
    width = int(known.sum(-1).max())
    assert torch.equal(found.ids[known[:, :width]], rows.ids[known])
    tails = rows.log_rest.exp().sum(-1)
    torch.testing.assert_close(found.log_rest.exp().sum(-1), tails, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.buckets.exp().sum(-1), torch.ones(n), rtol=1e-5, atol=1e-5)
    if exact:
        assert torch.equal(found.log_p, rows.log_p[:, :width])
        assert torch.equal(found.log_rest, rows.log_rest)
        return
    ratios = [(x.log_p[:, :width] - x.log_p[:, :1])[known[:, :width]] for x in (rows, found)]
    step = (-ratios[0].min() / 255).item()
    assert (ratios[0] - ratios[1]).abs().max() <= 0.6 * step + 1e-3 * abs(ratios[0].min().item()) + 1e-5
    near = rows.log_rest > tails.log()[:, None] - 20
    assert ((found.log_rest - rows.log_rest)[near].abs() <= 1.1 * CLASS_STEP).all()


def test_a_vocabulary_above_65536_takes_four_bytes_an_id() -> None:
    v = 70_000
    members = classes(v, 1)
    rows = coarsened(logits(2, v), 8, members)
    for vocabulary, width in ((v, 4), (65_536, 2)):
        assert encode(rows, Format(vocabulary, 1, False))["ids"].itemsize == width
    assert torch.equal(decode(encode(rows, Format(v, 1, False)), members, Format(v, 1, False)).ids, rows.ids)


def test_codes_cost_a_divergence_next_to_nothing() -> None:
    v, members = 500, classes(500, 4)
    teacher, student = logits(50, v), logits(50, v, seed=1)
    rows, how = coarsened(teacher, 32, members), Format(500, 4, False)
    found = decode(encode(rows, how), members, how)
    kept, whole = (coarse(forward_kl, x, student).sum().item() for x in (found, rows))
    assert kept == pytest.approx(whole, rel=1e-3)
    assert coarse(forward_kl, found, teacher).max() < 5e-3  # what the codes themselves lose


def test_sixty_four_tokens_with_sixteen_classes_take_less_than_two_hundred_bytes_a_row() -> None:
    v, n = 4_000, 400
    rows = coarsened(logits(n, v) * 0.7, 64, classes(v, 16))
    assert sum(array.nbytes for array in encode(rows, Format(v, 16, False)).values()) / n < 200


def test_a_class_that_holds_next_to_nothing_is_not_taken_for_an_empty_one() -> None:
    v, members = 64, classes(64, 2)
    teacher = logits(1, v)
    teacher[0, 1::2] -= 60
    how, student = Format(v, 2, False), logits(1, v, seed=1)
    rows = coarsened(teacher, 8, members)
    found = decode(encode(rows, how), members, how)
    assert coarse(reverse_kl, found, student).isfinite().all()
