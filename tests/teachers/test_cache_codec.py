"""Distributions as bytes: what comes back, how near it is, and how small."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.ops.coarse import CoarseDistribution, coarse_divergence, coarsen
from potstill.ops.divergence import forward_kl, reverse_kl
from potstill.teachers.cache_codec import CLASS_STEP, CodecFormat, decode, encode

law = settings(max_examples=40, derandomize=True)


def classes(v: int, c: int) -> Tensor:
    return torch.eye(c)[torch.arange(v) % c]


def logits(n: int, v: int, seed: int = 0) -> Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * 4


def there_and_back(rows: CoarseDistribution, how: CodecFormat) -> CoarseDistribution:
    return decode(encode(rows, how), len(rows), rows.members, how)


def dense(rows: CoarseDistribution) -> Tensor:
    """log p of every token [N V], -inf where it has no bucket of its own."""
    known = ~rows.log_p.isneginf()
    found = torch.full((len(rows), len(rows.members)), -torch.inf)
    found[known.nonzero()[:, 0], rows.ids[known]] = rows.log_p[known]
    return found


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
    how, members = CodecFormat(v, c, exact), classes(v, c)
    rows = coarsen(logits(n, v, seed), k, members, mass=mass)
    found = there_and_back(rows, how)
    assert (found.ids.diff(dim=-1) > 0)[~found.log_p[:, 1:].isneginf()].all()
    old, new = dense(rows), dense(found)
    assert torch.equal(old.isneginf(), new.isneginf())
    tails = rows.log_rest.exp().sum(-1)
    torch.testing.assert_close(found.log_rest.exp().sum(-1), tails, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.buckets.exp().sum(-1), torch.ones(n), rtol=1e-5, atol=1e-5)
    if exact:
        assert torch.equal(new, old)
        assert torch.equal(found.log_rest, rows.log_rest)
        return
    below = [x.amax(-1, keepdim=True) - x for x in (old, new)]
    known = ~old.isneginf()
    width = below[0].masked_fill(~known, 0.0).amax(-1, keepdim=True)
    step = 2 * (below[0] / width.clamp_min(1e-7)).sqrt() * width / 255  # of the square of a root in steps of 1 / 255
    allowed = 0.5 * step + width / 255**2 + 1e-3 * below[0] + 1e-5
    assert ((below[0] - below[1]).abs() <= allowed)[known].all()
    near = rows.log_rest > tails.log()[:, None] - 20
    assert ((found.log_rest - rows.log_rest)[near].abs() <= 1.1 * CLASS_STEP).all()


@pytest.mark.parametrize("v", [65_535, 65_536, 70_000])
def test_ids_of_every_vocabulary_come_back(v: int) -> None:
    members = classes(v, 1)
    rows = coarsen(logits(2, v), 8, members)
    last = torch.tensor([[v - 1, 0]]).expand(2, 2)
    rows = replace(rows, ids=torch.cat([last, rows.ids[:, 2:]], -1))
    how = CodecFormat(v, 1, False)
    assert torch.equal(there_and_back(rows, how).ids, rows.ids.sort(-1).values)
    assert how.int_dtype.itemsize == (2 if v < 65_536 else 4)


def test_a_row_of_all_tokens_of_a_vocabulary_of_65536_comes_back() -> None:
    v = 65_536
    rows = coarsen(logits(1, v), v, classes(v, 1))
    found = there_and_back(rows, CodecFormat(v, 1, True))
    assert torch.equal(found.ids[0], torch.arange(v))
    assert torch.equal(dense(found), dense(rows))


def test_a_window_without_rows_comes_back() -> None:
    members = classes(9, 2)
    rows = coarsen(logits(3, 9), 4, members)[:0]
    for exact in (False, True):
        assert len(there_and_back(rows, CodecFormat(9, 2, exact))) == 0


def test_codes_cost_a_divergence_next_to_nothing() -> None:
    v, members = 500, classes(500, 4)
    teacher, student = logits(50, v), logits(50, v, seed=1)
    rows, how = coarsen(teacher, 32, members), CodecFormat(500, 4, False)
    found = there_and_back(rows, how)
    kept, whole = (coarse_divergence(forward_kl, x, student).sum().item() for x in (found, rows))
    assert kept == pytest.approx(whole, rel=1e-3)
    assert coarse_divergence(forward_kl, found, teacher).max() < 5e-3  # what the codes themselves lose


def test_sixty_four_tokens_with_sixteen_classes_take_less_than_two_hundred_bytes_a_row() -> None:
    v, n = 4_000, 400
    rows = coarsen(logits(n, v) * 0.7, 64, classes(v, 16))
    assert encode(rows, CodecFormat(v, 16, False))["record"].nbytes / n < 200


def test_a_class_that_holds_next_to_nothing_is_not_taken_for_an_empty_one() -> None:
    v, members = 64, classes(64, 2)
    teacher = logits(1, v)
    teacher[0, 1::2] -= 60
    how, student = CodecFormat(v, 2, False), logits(1, v, seed=1)
    rows = coarsen(teacher, 8, members)
    found = there_and_back(rows, how)
    assert coarse_divergence(reverse_kl, found, student).isfinite().all()


def test_a_token_that_is_all_but_impossible_and_a_rest_of_all_the_mass_stay_numbers() -> None:
    v, members = 8, classes(8, 2)
    how, rows = CodecFormat(v, 2, False), coarsen(torch.tensor([[0.0, -1e6, -1.0, -2.0, 0, 0, 0, 0]]), v, members)
    assert dense(there_and_back(rows, how)).isfinite().all()
    full = replace(rows, log_rest=torch.full((1, 2), 0.5 + 1e-6).log())
    assert not there_and_back(full, how).buckets.isnan().any()
