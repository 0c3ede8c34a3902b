"""Divergences between two next-token distributions, row by row, in nats.

p = softmax(teacher) and q = softmax(student), each from logits `[N V]`; the result is `[N]`. The caller chooses the
rows and the divisor of the sum. Every divergence is >= 0, and 0 only if p = q. Softmaxes are in float32 at least, and 0
log 0 = 0. So logits of -inf (masked tokens) leave values and gradients finite whenever the divergence itself is finite.
Gradients flow to both sides: the caller detaches the teacher.

A new divergence is a function under `@declare_facts(...)` and a row of `DIVERGENCES`. `ops.divergence_gradient` has
derivatives by the student's logits, in fewer passes over memory than autograd needs.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from potstill.ops.precision import upcast

HEAD_SIZE = 64  # the search for the head of a distribution begins among this many tokens

Divergence = Callable[[Tensor, Tensor], Tensor]  # (teacher [N V], student [N V]) -> [N]
AnyDivergence = TypeVar("AnyDivergence", bound=Callable[..., Tensor])  # one that may take options by keyword


class DivergenceFacts(NamedTuple):
    """Properties of a divergence that the caller may rely on. The defaults claim none.

    Attributes:
        is_f_divergence: merging tokens never raises it, so a partial distribution (`ops.coarse`) gives a lower bound.
        supports_sampled_tokens: tokens drawn from the teacher give an unbiased gradient.
        has_full_gradient: its gradient is the gradient of its value; False if parts of the value count as constants.
        is_for_drafts: it falls where and only where a target accepts more of the student's drafts.
    """

    is_f_divergence: bool = False
    supports_sampled_tokens: bool = False
    has_full_gradient: bool = True
    is_for_drafts: bool = False


_facts: dict[Callable[..., Tensor], DivergenceFacts] = {}


def declare_facts(
    *,
    is_f_divergence: bool = False,
    supports_sampled_tokens: bool = False,
    has_full_gradient: bool = True,
    is_for_drafts: bool = False,
) -> Callable[[AnyDivergence], AnyDivergence]:
    """Decorate a divergence with its facts."""

    def declare(divergence: AnyDivergence) -> AnyDivergence:
        _facts[divergence] = DivergenceFacts(is_f_divergence, supports_sampled_tokens, has_full_gradient, is_for_drafts)
        return divergence

    return declare


def get_facts(divergence: Divergence) -> DivergenceFacts:
    """The declared facts of a divergence, with or without bound options; the defaults if there are none."""
    return _facts.get(divergence.func if isinstance(divergence, partial) else divergence, DivergenceFacts())


@declare_facts(is_f_divergence=True, supports_sampled_tokens=True)
def forward_kl(teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(p||q) = sum p (log p - log q): the student covers the teacher's modes (Hinton et al., arXiv:1503.02531)."""
    return _kl(log_softmax(teacher), log_softmax(student))


@declare_facts(is_f_divergence=True)
def reverse_kl(teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(q||p) = sum q (log q - log p): the student picks some of the teacher's modes (Gu et al., arXiv:2306.08543)."""
    return _kl(log_softmax(student), log_softmax(teacher))


@declare_facts(is_f_divergence=True)
def jsd(teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"], *, beta: float = 0.5) -> Float[Tensor, " N"]:
    """beta KL(p||M) + (1 - beta) KL(q||M) with M = beta p + (1 - beta) q (Agarwal et al., arXiv:2306.13649).

    The formula vanishes at beta = 0 and 1. As usual, these two ends mean the limits after division by beta and by
    1 - beta: beta = 0 is exactly `forward_kl` and beta = 1 exactly `reverse_kl`. At 0.5 it is symmetric and at most
    log 2.

    Raises: ValueError if beta is outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta = {beta} of the Jensen-Shannon divergence is not a share: choose it in [0, 1]")
    if beta == 0:
        return forward_kl(teacher, student)
    if beta == 1:
        return reverse_kl(teacher, student)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


@declare_facts(is_f_divergence=True)
def skew_kl(teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"], *, skew: float = 0.1) -> Float[Tensor, " N"]:
    """KL(p || skew p + (1 - skew) q), at most -log skew (Ko et al., arXiv:2402.03898); skew = 0 is `forward_kl`.

    Departs from the authors' code, which leaves out the teacher's entropy: here equal models give 0.

    Raises: ValueError if skew is outside [0, 1).
    """
    if _check_skew(skew) == 0:
        return forward_kl(teacher, student)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    return _kl(log_p, _log_mixture(log_p, log_q, skew))


@declare_facts(is_f_divergence=True)
def skew_reverse_kl(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"], *, skew: float = 0.1
) -> Float[Tensor, " N"]:
    """KL(q || (1 - skew) p + skew q), at most -log skew (Ko et al., arXiv:2402.03898); skew = 0 is `reverse_kl`.

    The student inside the mixture is not detached.

    Raises: ValueError if skew is outside [0, 1).
    """
    if _check_skew(skew) == 0:
        return reverse_kl(teacher, student)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    return _kl(log_q, _log_mixture(log_q, log_p, skew))


@declare_facts(has_full_gradient=False)
def adaptive_kl(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"], *, tail: float = 0.5
) -> Float[Tensor, " N"]:
    """w KL(p||q) + (1 - w) KL(q||p), w = the head's share of sum |p - q| (Wu et al., arXiv:2404.02657, AKL).

    The tail is the set of the teacher's least likely tokens with at most `tail` of its probability in total; the head
    is the rest. The weights count as constants in the gradient. Where p = q they are 0/0 and the value is 0. Departs
    from the authors' code at ties: equally likely tokens are all in the head or all in the tail, so permuting the
    vocabulary changes nothing.

    Raises: ValueError if tail is outside (0, 1).
    """
    if not 0 < tail < 1:
        raise ValueError(f"tail = {tail} of the adaptive KL is not a share of the teacher's mass: choose it in (0, 1)")
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    with torch.no_grad():
        gap = (log_p.exp() - log_q.exp()).abs()
        tail_share = (gap * _tail_mask(log_p, tail)).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    return (1 - tail_share) * _kl(log_p, log_q) + tail_share * _kl(log_q, log_p)


@declare_facts(is_f_divergence=True, is_for_drafts=True)
def total_variation(teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """1/2 sum |p - q| = 1 - sum min(p, q), at most 1: the share of a draft that its target rejects (arXiv:2211.17192).

    At a tie p[v] = q[v] the gradient takes the middle of its two one-sided values (Wen et al., arXiv:2307.15190).
    """
    return (log_softmax(teacher).exp() - log_softmax(student).exp()).abs().sum(-1) / 2


@declare_facts(is_f_divergence=True, is_for_drafts=True)  # it rises with the total variation, which is one
def acceptance_nll(teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """-log sum min(p, q): minus the log of the share of a draft that its target accepts (arXiv:2211.17192, cor. 3.6).

    Its gradient is that of `total_variation` over the acceptance, so rows that are rarely accepted count more. Ties as
    there. Where p and q share no token it is infinite.
    """
    return -torch.minimum(log_softmax(teacher), log_softmax(student)).logsumexp(-1)


def cross_entropy(student: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-log q[target], in nats; no target is ignored."""
    return -log_softmax(student).gather(-1, targets[:, None]).squeeze(-1)


def apply_temperature(divergence: Divergence, temperature: float) -> Divergence:
    """tau^2 D(teacher / tau, student / tau) (Hinton et al., arXiv:1503.02531, sec. 2).

    The square keeps the scale of the gradient, which would otherwise fall as 1 / tau^2.

    Raises: ValueError if the temperature is not positive and finite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature} divides logits: choose a positive, finite number")

    def tempered_divergence(teacher: Tensor, student: Tensor) -> Tensor:
        return temperature**2 * divergence(upcast(teacher) / temperature, upcast(student) / temperature)

    return divergence if temperature == 1 else tempered_divergence


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": jsd,
        "skew_kl": skew_kl,
        "skew_reverse_kl": skew_reverse_kl,
        "adaptive_kl": adaptive_kl,
        "total_variation": total_variation,
        "acceptance_nll": acceptance_nll,
    }
)


def log_softmax(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """log softmax in float32 at least."""
    return torch.log_softmax(upcast(logits), -1)


def _kl(log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    p = log_p.exp()
    ratio = torch.where(p > 0, log_p - log_q, 0.0)  # masked before the product, or 0 * inf is NaN in the gradient
    return (p * ratio).sum(-1)


def _log_mixture(log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"], weight: float) -> Float[Tensor, "N V"]:
    """log(weight p + (1 - weight) q), for 0 < weight < 1; where both are 0 it is very low, with gradient 0."""
    floor = torch.finfo(log_p.dtype).min / 4  # one finite side suffices: logaddexp(-inf, -inf) has a gradient of NaN
    return torch.logaddexp(log_p.clamp_min(floor) + math.log(weight), log_q + math.log1p(-weight))


def _tail_mask(log_p: Float[Tensor, "N V"], mass: float) -> Bool[Tensor, "N V"]:
    """The tokens below the first one, from the least likely upward, whose cumulative p exceeds `mass`.

    From the likeliest token downward, the first of them is the last token with less than 1 - mass above it. So it sorts
    only the tokens that have 1 - mass in total.
    """
    vocabulary, head_size = log_p.shape[-1], HEAD_SIZE
    while True:
        top = log_p.topk(min(head_size, vocabulary), -1).values
        p = top.exp()
        is_head = p.cumsum(-1) - p < 1 - mass
        if head_size >= vocabulary or not is_head[..., -1].any():
            return log_p < top.masked_fill(~is_head, math.inf).amin(-1, keepdim=True)
        head_size *= 8


def _check_skew(skew: float) -> float:
    if not 0 <= skew < 1:
        raise ValueError(f"skew = {skew} is not a share of the first distribution in the mixture: choose it in [0, 1)")
    return skew
