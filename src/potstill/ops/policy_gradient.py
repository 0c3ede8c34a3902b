"""The clipped policy gradient of a token, with a penalty for leaving a reference.

    l = -min(rho A, clip(rho, 1 - low, 1 + high) A) + beta k3        rho = q(y) / q_old(y)
    k3 = p(y) / q(y) - log(p(y) / q(y)) - 1

q is the policy, q_old the policy that drew the token y, p the reference and A the advantage. All three distributions
have the temperature at which y was drawn. k3 is at least 0. For tokens that q drew it is an unbiased estimate of
KL(q || p), and its derivative by log q(y) is 1 - p(y) / q(y).

Sources: Schulman et al., "Proximal Policy Optimization" (arXiv:1707.06347), equation 7; Shao et al., "DeepSeekMath"
(arXiv:2402.03300), equations 3 and 4; Yu et al., "DAPO" (arXiv:2503.14476), equation 10, for two clips.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from potstill.ops.divergence import cross_entropy
from potstill.ops.softmax import Slope, Softmax, cross_entropy_slope, differentiate_loss


class Clip(NamedTuple):
    """The range [1 - low, 1 + high] of ratios that have a gradient."""

    low: float = 0.2
    high: float = 0.2


DEFAULT_CLIP = Clip()


def policy_loss(
    log_q: Float[Tensor, " N"],
    old_log_q: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip: Clip = DEFAULT_CLIP,
) -> Float[Tensor, " N"]:
    """-min(rho A, clip(rho) A) of each token, differentiable by `log_q`."""
    ratio = (log_q - old_log_q).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip.low, 1 + clip.high) * advantages)


def find_clipped(
    log_q: Float[Tensor, " N"],
    old_log_q: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    clip: Clip = DEFAULT_CLIP,
) -> Bool[Tensor, " N"]:
    """Whether the clip removes the gradient of a token: A > 0 and rho > 1 + high, or A < 0 and rho < 1 - low."""
    ratio = (log_q - old_log_q).exp()
    return ((advantages > 0) & (ratio > 1 + clip.high)) | ((advantages < 0) & (ratio < 1 - clip.low))


def estimate_kl(log_q: Float[Tensor, " N"], log_p: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """k3 of each token, in nats."""
    return torch.expm1(log_p - log_q) - (log_p - log_q)


@dataclass(frozen=True, kw_only=True)
class PolicyRows:
    """l of each row for its target. The inputs `[C]` are named: A, log q_old(target) and log p(target).

    Without `old`, log q_old is log q as a constant: rho is 1, and the derivative is that of -A log q. Without
    `reference` there is no penalty. `kl` is beta.
    """

    advantages: str
    old: str | None = None
    reference: str | None = None
    clip: Clip = DEFAULT_CLIP
    kl: float = 0.0

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        log_q = -cross_entropy(student, targets)
        advantages, old, reference = self._read(frozen, log_q)
        values = policy_loss(log_q, old, advantages, self.clip)
        return values if reference is None else values + self.kl * estimate_kl(log_q, reference)

    def values_and_gradient(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
        """The values and their derivative by the student's logits."""
        return differentiate_loss(self, student, frozen, targets)

    def slope(self, student: Softmax, frozen: Mapping[str, Any], targets: Int[Tensor, " C"]) -> Slope:
        """Both from a shared softmax: (dl / d log q) (onehot(target) - q)."""
        target_slope = cross_entropy_slope(student, targets)
        log_q = -target_slope.values
        advantages, old, reference = self._read(frozen, log_q)
        values, ratio = policy_loss(log_q, old, advantages, self.clip), (log_q - old).exp()
        by_log_q = -(ratio * advantages).masked_fill(find_clipped(log_q, old, advantages, self.clip), 0.0)
        if reference is not None:
            values = values + self.kl * estimate_kl(log_q, reference)
            by_log_q = by_log_q - self.kl * torch.expm1(reference - log_q)
        return target_slope.weight_rows(-by_log_q)._replace(values=values)

    def _read(self, frozen: Mapping[str, Any], log_q: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(A, log q_old, log p or None) in the dtype of `log_q`."""
        old = log_q.detach() if self.old is None else frozen[self.old].to(log_q.dtype)
        reference = None if self.reference is None else frozen[self.reference].to(log_q.dtype)
        return frozen[self.advantages].to(log_q.dtype), old, reference


@dataclass(frozen=True)
class TargetStatistic:
    """`compute(log q(target) [C], inputs) -> [C]`, a number to be logged; it has no gradient."""

    compute: Callable[[Tensor, Mapping[str, Any]], Tensor]

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        return self.compute(-cross_entropy(student.detach(), targets), frozen)

    def slope(self, student: Softmax, frozen: Mapping[str, Any], targets: Int[Tensor, " C"]) -> Slope:
        """The number from a shared softmax, and no derivative."""
        values = self.compute(-cross_entropy_slope(student, targets).values, frozen)
        return Slope(values, 0.0, lambda delta, weight: None)
