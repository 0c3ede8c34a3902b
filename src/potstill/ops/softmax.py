"""One softmax of the student's logits for all losses of a row whose derivatives are multiples of it.

    d loss_k / d z = a_k q + b_k        q = softmax(z), a_k a number for each row, b_k a tensor of the loss

So sum_k w_k loss_k has the derivative (sum_k w_k a_k) q + sum_k w_k b_k. `combine_slopes` scales q once, in place, and
each loss adds its b_k. For cross-entropy b is -onehot(target). For forward KL it is -p, which stays in memory until
then.

Source: the definition of each loss in `ops.divergence` and `ops.coarse`, differentiated by hand.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.ops.coarse import CoarseDistribution
from potstill.ops.divergence_gradient import (
    acceptance_nll_by_log_q,
    kl_of_logits,
    log_partition,
    total_variation_by_log_q,
)

RowWeight = float | Float[Tensor, "C 1"]  # a number for all rows, or one for each


class Softmax:
    """Logits [C V] of the student with q and log Z, each computed on first use."""

    def __init__(self, logits: Float[Tensor, "C V"]) -> None:
        self.logits = logits

    @cached_property
    def q(self) -> Float[Tensor, "C V"]:
        """softmax(logits); `combine_slopes` overwrites it."""
        return self.logits.softmax(-1)

    @cached_property
    def log_z(self) -> Float[Tensor, " C"]:
        """log sum exp(logits)."""
        return log_partition(self.logits, self.q)


class Slope(NamedTuple):
    """Values of a loss and its derivative a q + b: `coefficient` is a; `add(delta, weight)` adds weight b to delta."""

    values: Float[Tensor, " C"]
    coefficient: RowWeight
    add: Callable[[Float[Tensor, "C V"], RowWeight], Any]

    def weight_rows(self, weights: Tensor) -> "Slope":
        """The slope of the loss times `weights [C]`; False is 0. A row of weight 0 is 0, even if it was not finite."""
        weights = weights.to(self.values.dtype)
        row_weights, values = weights[:, None], torch.where(weights == 0, 0.0, self.values * weights)
        return Slope(
            values, self.coefficient * row_weights, lambda delta, weight: self.add(delta, weight * row_weights)
        )


@runtime_checkable
class SupportsSharedSoftmax(Protocol):
    """A row loss that can compute values and derivative from a shared softmax."""

    def slope(self, student: Softmax, frozen: Mapping[str, Any], targets: Tensor) -> Slope | None:
        """Values and derivative; None if the derivative does not have this form."""
        ...


def differentiate_loss(
    loss: SupportsSharedSoftmax, logits: Tensor, frozen: Mapping[str, Any], targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(values, derivative by the logits) of one loss that always has a slope."""
    student = Softmax(logits)
    slope = loss.slope(student, frozen, targets)
    assert slope is not None
    return slope.values, combine_slopes(student, [(1.0, slope)])


def get_slope(loss: Any, student: Softmax, frozen: Mapping[str, Any], targets: Tensor) -> Slope | None:
    """The slope of any row loss; None if it has none."""
    return loss.slope(student, frozen, targets) if isinstance(loss, SupportsSharedSoftmax) else None


def cross_entropy_slope(student: Softmax, targets: Int[Tensor, " C"]) -> Slope:
    """-log q[target], with q - onehot(target)."""
    targets = targets[:, None]
    values = student.log_z - student.logits.gather(-1, targets)[:, 0]
    return Slope(
        values, 1.0, lambda delta, weight: delta.scatter_add_(-1, targets, -weight * delta.new_ones(targets.shape))
    )


def forward_kl_slope(teacher: Float[Tensor, "C V"], student: Softmax) -> Slope:
    """KL(p||q), with q - p."""
    p = teacher.softmax(-1)
    return Slope(
        kl_of_logits(teacher, student.logits, p, student.log_z), 1.0, lambda delta, w: _subtract_weighted(delta, p, w)
    )


def total_variation_slope(teacher: Float[Tensor, "C V"], student: Softmax) -> Slope:
    """1/2 sum |p - q|, with b - q sum(b), b = 1/2 q sign(q - p)."""
    return _make_slope(*total_variation_by_log_q(teacher, student.logits))


def acceptance_nll_slope(teacher: Float[Tensor, "C V"], student: Softmax) -> Slope:
    """-log sum min(p, q), with b - q sum(b), b its derivative by log q."""
    return _make_slope(*acceptance_nll_by_log_q(teacher, student.logits))


def _make_slope(values: Float[Tensor, " C"], by_log_q: Float[Tensor, "C V"]) -> Slope:
    """The slope of a loss whose derivative by log q is `by_log_q`."""
    return Slope(values, -by_log_q.sum(-1, keepdim=True), lambda delta, w: _subtract_weighted(delta, by_log_q, -w))


def coarse_kl_slope(teacher: CoarseDistribution, student: Softmax) -> Slope:
    """KL(p~||q~) over the teacher's tokens and classes (`ops.coarse`).

    b is -p[v] at the listed tokens, and -q[v] r_c(p) / r_c(q) at any other token v of class c.
    """
    logits, members = student.logits, teacher.members.to(student.logits.dtype)
    log_p, log_tail = (x.to(logits.dtype) for x in (teacher.log_p, teacher.log_rest))
    p, tail = log_p.exp(), log_tail.exp()
    total = p.sum(-1, keepdim=True) + tail.sum(
        -1, keepdim=True
    )  # probabilities stored in few bits sum to 1 only approximately
    p, tail = p.div_(total), tail.div_(total)
    unlisted = student.q.scatter(
        -1, teacher.ids, torch.zeros_like(p)
    )  # a scatter of the number 0 takes four times as long
    mass = unlisted @ members
    mass = torch.where(tail > 0, mass.clamp_min(torch.finfo(mass.dtype).tiny), mass)  # so that no log overflows
    log_q = logits.gather(-1, teacher.ids).sub_(student.log_z[:, None])
    values = _kl(p, log_p - total.log(), log_q) + _kl(tail, log_tail - total.log(), mass.log())
    unlisted.mul_(torch.where(mass > 0, tail / mass, 0.0) @ members.T)

    def add(delta: Float[Tensor, "C V"], weight: RowWeight) -> None:
        _subtract_weighted(delta, unlisted, weight)
        delta.scatter_add_(-1, teacher.ids, -weight * _mask_zero_weight(p, weight))

    return Slope(values, 1.0, add)


def combine_slopes(student: Softmax, slopes: Sequence[tuple[float, Slope]]) -> Float[Tensor, "C V"]:
    """The derivative of sum_k w_k loss_k, in the memory of q."""
    coefficient = sum(weight * slope.coefficient for weight, slope in slopes)
    delta = student.q if isinstance(coefficient, float) and coefficient == 1 else student.q.mul_(coefficient)
    for weight, slope in slopes:
        slope.add(delta, weight)
    return delta


def _subtract_weighted(delta: Float[Tensor, "C V"], term: Float[Tensor, "C V"], weight: RowWeight) -> None:
    """delta -= weight * term."""
    if isinstance(weight, Tensor):
        delta.addcmul_(_mask_zero_weight(term, weight), weight, value=-1)
    else:
        delta.sub_(term, alpha=weight)


def _mask_zero_weight(term: Float[Tensor, "C K"], weight: RowWeight) -> Float[Tensor, "C K"]:
    """`term` with 0 in rows of weight 0, where it may not be finite."""
    return term.masked_fill(weight == 0, 0.0) if isinstance(weight, Tensor) else term


def _kl(p: Float[Tensor, "C K"], log_p: Float[Tensor, "C K"], log_q: Float[Tensor, "C K"]) -> Float[Tensor, " C"]:
    return torch.linalg.vecdot(p, (log_p - log_q).masked_fill_(p == 0, 0.0))
