"""A weighted row loss is the loss times its weights, in value and gradient."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from potstill.ops import fused
from potstill.ops.coarse import coarsen
from potstill.ops.divergence import jsd
from potstill.ops.fused import sum_row_losses, sum_row_losses_densely
from potstill.ops.row_loss import CrossEntropyRows, DivergenceRows, Weighted, WhereAvailable
from potstill.ops.row_subset import RowSubset


def test_weights_multiply_values_and_gradients_whatever_their_sign() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets, said = torch.tensor([0, 5, 2, 2]), {"w": torch.tensor([2.0, 0.0, -1.5, 1.0], dtype=torch.float64)}
    loss = Weighted(CrossEntropyRows(), "w")
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none") * said["w"]
    (by_hand,) = torch.autograd.grad(expected.sum(), logits)
    values, gradient = loss.values_and_gradient(logits.detach(), said, targets)
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(loss(logits.detach(), said, targets), expected.detach())
    torch.testing.assert_close(gradient, by_hand)
    assert not gradient[1].any()


def told(own: Tensor, logits: Tensor, k: int | None) -> Callable[[int, int], RowSubset]:
    """What a teacher says of its own rows alone, whole or by its `k` likeliest tokens."""
    said = logits[own] if k is None else coarsen(logits[own], k, torch.eye(2).double()[torch.arange(7) % 2])
    before = torch.cat([own.new_zeros(1, dtype=torch.long), own.long().cumsum(0)]).tolist()

    def telling(start: int, stop: int) -> RowSubset:
        some = own[start:stop]
        return RowSubset(said[before[start] : before[stop]], torch.where(some, some.cumsum(0) - 1, -1))

    return telling


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("block", [1, 2**18])
@pytest.mark.parametrize("chunk", [1, 3, 4, 10])
def test_rows_of_which_nothing_is_told_give_nothing_whatever_the_chunk(
    k: int | None, block: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    rows, weight, teacher = (torch.randn(n, d, generator=generator).double() for n, d in ((10, 4), (7, 4), (10, 7)))
    own = torch.tensor([0, 0, 1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    loss = WhereAvailable(DivergenceRows(jsd, temperature=2.0), "teacher")
    frozen, targets = {"teacher": told(own, teacher, k)}, torch.zeros(10, dtype=torch.long)
    found = []
    for compute in (partial(sum_row_losses, mix=(1.0, 0.5), chunk=chunk), sum_row_losses_densely):
        x, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        soft, hard = compute([loss, CrossEntropyRows()], x, (w, None, 1.0, None), targets=targets, frozen=frozen)
        found.append((soft.detach(), *torch.autograd.grad(soft + 0.5 * hard, (x, w))))
    for fast, defined in zip(*found, strict=True):
        torch.testing.assert_close(fast, defined)
    x = rows.clone().requires_grad_()
    alone = {"teacher": lambda a, b: told(own, teacher, k)(0, 10).values[a:b]}
    few = sum_row_losses_densely([loss.loss], x[own], (weight, None, 1.0, None), targets=targets[own], frozen=alone)[0]
    torch.testing.assert_close(found[0][0], few.detach())
