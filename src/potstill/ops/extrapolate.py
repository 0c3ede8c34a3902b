"""AlignDistil's target: a distribution moved further along the difference of two policies, at each position.

    alpha = ratio TVD(p+, p-) + epsilon         TVD = 1/2 sum |p+ - p-|, p+ = softmax(z+), p- = softmax(z-)
    z* = z + alpha (z+ - z-)                     z = z+ with contrast, else z-
    loss = beta / alpha KL(q || softmax(z*))     q: the trained policy; alpha and z* have no gradient

z+ are the logits of a policy that prefers the chosen answers, z- those of a reverse policy. With z- those of the
reference and without contrast, this is the theorem of the paper: maximizing E_q[beta log(p+ / p_ref)] - b KL(q||p_ref)
over q is minimizing b KL(q || softmax(z*)). Here b is the weight of the KL to the reference, and alpha = beta / b. The
identity holds at each position, for a given prefix. `ratio` 0 makes alpha the constant `epsilon`. A constant added to
all logits of a row changes nothing.

Source: Zhang et al., "AlignDistil" (arXiv:2503.02832), theorem 1 and the adaptive extrapolation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.ops.divergence import log_softmax, reverse_kl, total_variation
from potstill.ops.precision import upcast


def target(
    plus: Float[Tensor, "N V"],
    minus: Float[Tensor, "N V"],
    *,
    ratio: float = 20.0,
    epsilon: float = 1e-3,
    contrast: bool = True,
) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"]]:
    """(log softmax(z*), alpha) of each row, from finite logits z+ and z-.

    alpha lies in [epsilon, ratio + epsilon]. With uniform z-, the target is p+ sharpened by 1 + alpha.

    Departs from the authors' code, whose TVD lacks the factor 1/2: their `beta2` is half of this `ratio`.
    """
    plus, minus = upcast(plus), upcast(minus)
    alpha = ratio * total_variation(plus, minus) + epsilon if ratio else plus.new_full((len(plus),), epsilon)
    return log_softmax((plus if contrast else minus).addcmul(alpha[:, None], plus - minus)), alpha


@dataclass(frozen=True)
class ExtrapolationRows:
    """The row loss beta / alpha KL(q || p*), with the inputs `plus` and `minus`, logits of two frozen networks.

    Where p+ and p- agree, alpha is small and the row weighs much: there the policy is held to p+.
    """

    plus: str = "plus"
    minus: str = "minus"
    beta: float = 0.1
    ratio: float = 20.0
    epsilon: float = 1e-3
    contrast: bool = True

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        log_p, weights = self._compute_target(frozen)
        return weights * reverse_kl(log_p, student)

    def values_and_gradient(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
        """The values and their derivative by the student's logits."""
        log_p, weights = self._compute_target(frozen)
        values, gradient = differentiate_reverse_kl(log_p, student)
        return values * weights, gradient.mul_(weights[:, None])

    def _compute_target(self, frozen: Mapping[str, Any]) -> tuple[Float[Tensor, "C V"], Float[Tensor, " C"]]:
        """(log p*, beta / alpha)."""
        plus, minus = frozen[self.plus], frozen[self.minus]
        log_p, alpha = target(plus, minus, ratio=self.ratio, epsilon=self.epsilon, contrast=self.contrast)
        return log_p, self.beta / alpha


def differentiate_reverse_kl(
    log_p: Float[Tensor, "C V"], student: Float[Tensor, "C V"]
) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
    """KL(q || p) of finite log p, and its derivative by the student's logits, q (log q - log p - KL)."""
    log_q = log_softmax(student)
    q = log_q.exp()
    gap = log_q.sub_(log_p)
    values = torch.linalg.vecdot(q, gap)
    return values, gap.sub_(values[:, None]).mul_(q)
