"""Likelihoods of the same text under two models with different tokenizations.

    L(g) = sum over the tokens of group g of log p(token | the text before it)
    d(P, Q) = P log(P / Q) + (1 - P) log((1 - P) / (1 - Q))        P = exp(L_teacher(g)), Q = exp(L_student(g))

d is the divergence over the two outcomes "this text follows" and "another text follows". By the data-processing
inequality it is at most the divergence between the two models' distributions over texts. It is at least 0, and 0 only
if P = Q. The first summand alone, P log(P / Q), would be minimal for a student that gives every text the probability 1.

Source: the definition; TRL's GOLD compares groups (`objectives.spans`). P is the probability of one tokenization of the
text, not of the text: both sides ignore all other tokenizations.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_LOG_P = -1e-6  # above this, float32 cannot tell the probability of "another text" from 0


def sum_groups(values: Float[Tensor, " N"], group: Int[Tensor, " N"], total: int) -> Float[Tensor, " G"]:
    """The sums over the rows of each group."""
    return values.new_zeros(total).index_add(0, group, values)


def binary_kl(log_p: Float[Tensor, " G"], log_q: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
    """d(exp(log_p), exp(log_q)) in nats; differentiable by both, with gradient 0 at probabilities near 1."""
    log_p, log_q = log_p.clamp(max=MAX_LOG_P), log_q.clamp(max=MAX_LOG_P)
    not_p, not_q = log_complement(log_p), log_complement(log_q)
    return log_p.exp() * (log_p - log_q) + not_p.exp() * (not_p - not_q)


def binary_kl_with_slope(
    log_p: Float[Tensor, " G"], log_q: Float[Tensor, " G"]
) -> tuple[Float[Tensor, " G"], Float[Tensor, " G"]]:
    """`binary_kl` and its derivative by log_q, (Q - P) / (1 - Q)."""
    p, q = log_p.clamp(max=MAX_LOG_P).exp(), log_q.exp()
    slope = (q - p) / -torch.expm1(log_q.clamp(max=MAX_LOG_P))
    return binary_kl(log_p, log_q), slope.masked_fill(log_q > MAX_LOG_P, 0.0)


def log_complement(log_p: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
    """log(1 - exp(log_p))."""
    return torch.log(-torch.expm1(log_p))
