"""Divergences with their derivatives by the student's logits z, p = teacher and q = student.

A derivative b by log q gives b - q sum(b) by z. `WITH_GRADIENT` holds every divergence that has one here; autograd
differentiates all others. Source: the definition of each divergence in `ops.divergence`, differentiated by hand.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.ops.divergence import (
    Divergence,
    acceptance_nll,
    forward_kl,
    log_softmax,
    total_variation,
)
from potstill.ops.precision import upcast


def forward_kl_with_gradient(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """`forward_kl` as sum p (z_p - z_q) - log Z_p + log Z_q, and its derivative by the student's logits z_q, q - p."""
    teacher, student = upcast(teacher), upcast(student)
    p, q = teacher.softmax(-1), student.softmax(-1)
    return kl_of_logits(teacher, student, p, log_partition(student, q)), q.sub_(p)


def total_variation_with_gradient(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """`total_variation`, and q (s - sum q s) with s = 1/2 sign(q - p)."""
    values, by_log_q = total_variation_by_log_q(teacher, student)
    return values, by_log_q.addcmul_(upcast(student).softmax(-1), by_log_q.sum(-1, keepdim=True), value=-1)


def acceptance_nll_with_gradient(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """`acceptance_nll`, and q sum w t - w t with w = min(p, q) / sum min(p, q), t = 1 where q < p and 1/2 at a tie."""
    values, by_log_q = acceptance_nll_by_log_q(teacher, student)
    return values, by_log_q.addcmul_(upcast(student).softmax(-1), by_log_q.sum(-1, keepdim=True), value=-1)


def total_variation_by_log_q(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """(`total_variation`, its derivative by log q)."""
    q = log_softmax(student).exp()  # as in the definition: equal rounding finds the same ties
    gap = q - log_softmax(teacher).exp()
    return gap.abs().sum(-1) / 2, gap.sign_().mul_(q).div_(2)


def acceptance_nll_by_log_q(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """(`acceptance_nll`, its derivative by log q)."""
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    smaller = torch.minimum(log_p, log_q)
    log_acceptance = smaller.logsumexp(-1)
    side = (log_q < log_p).to(log_q.dtype).add_((log_q <= log_p).to(log_q.dtype)).div_(-2)
    return -log_acceptance, smaller.sub_(log_acceptance[:, None]).exp_().mul_(side)


def log_partition(logits: Float[Tensor, "N V"], p: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """log sum exp(logits) from `p`, their softmax, without a second exponential: z = log p + log Z at the largest p."""
    return logits.amax(-1) - p.amax(-1).log()


def kl_of_logits(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"], p: Float[Tensor, "N V"], log_z: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """sum p (z_p - z_q) - log Z_p + log Z_q with `log_z` = log Z_q, which takes no logarithm of every token."""
    kl = torch.linalg.vecdot(p, teacher - student) - log_partition(teacher, p) + log_z
    if kl.isnan().any():  # a masked token: 0 (-inf - z)
        kl = forward_kl(teacher, student)
    return kl


WITH_GRADIENT: Mapping[Divergence, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = MappingProxyType(
    {
        forward_kl: forward_kl_with_gradient,
        total_variation: total_variation_with_gradient,
        acceptance_nll: acceptance_nll_with_gradient,
    }
)
