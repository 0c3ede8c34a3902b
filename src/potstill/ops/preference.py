"""Losses of preferences: of pairs of answers to one prompt, or of single answers with a label. All are in nats.

    Side(policy, reference, tokens)     per answer: log pi(y|x), log pi_ref(y|x), and the number of its tokens |y|
    r = log pi(y|x) - log pi_ref(y|x)           a = log pi(y|x) / |y|           w: chosen, l: rejected

    dpo     -(1 - s) log sigma(m) - s log sigma(-m)                 m = beta (r_w - r_l)            s = smoothing
    ipo     (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2
    simpo   -log sigma(beta (a_w - a_l) - gamma)
    orpo    -a_w - weight log sigma(log odds_w - log odds_l)        odds = exp(a) / (1 - exp(a))
    kto     1 - sigma(beta (r - z)) if desirable, 1 - sigma(beta (z - r)) if not        z = baseline

Log-probabilities are sums over the tokens of the answer alone, its end token included. Prompts do not count.

Sources: DPO (Rafailov et al., arXiv:2305.18290, equation 7) and its smoothing, cDPO (Mitchell, 2023); IPO (Azar et al.,
arXiv:2310.12036, equation 17); SimPO (Meng et al., arXiv:2405.14734, equation 6); ORPO (Hong et al., arXiv:2403.07691,
equations 6 and 7); KTO (Ethayarajh et al., arXiv:2402.01306, equation 8).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from potstill.ops.likelihood import MAX_LOG_P, log_complement


class Side(NamedTuple):
    """The chosen or the rejected answers of P pairs, or P single answers."""

    policy: Float[Tensor, " P"]
    reference: Float[Tensor, " P"]
    tokens: Float[Tensor, " P"]

    @property
    def log_ratio(self) -> Float[Tensor, " P"]:
        """log pi(y|x) - log pi_ref(y|x)."""
        return self.policy - self.reference

    @property
    def token_log_p(self) -> Float[Tensor, " P"]:
        """log pi(y|x) / |y|."""
        return self.policy / self.tokens

    @property
    def log_odds(self) -> Float[Tensor, " P"]:
        """log p - log(1 - p), p the geometric mean of the tokens' probabilities; finite for p = 1."""
        log_p = self.token_log_p.clamp(max=MAX_LOG_P)
        return log_p - log_complement(log_p)


def dpo_margin(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Float[Tensor, " P"]:
    """beta (r_w - r_l): the difference of the rewards that the policy implies."""
    return beta * (chosen.log_ratio - rejected.log_ratio)


def dpo(chosen: Side, rejected: Side, *, beta: float = 0.1, smoothing: float = 0.0) -> Float[Tensor, " P"]:
    """-(1 - s) log sigma(m) - s log sigma(-m), m = `dpo_margin`, s = `smoothing`: the share of labels that are wrong.

    It is log 2 where policy and reference agree. Sources: arXiv:2305.18290, equation 7; cDPO for the smoothing.
    """
    margin = dpo_margin(chosen, rejected, beta=beta)
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def ipo_margin(chosen: Side, rejected: Side) -> Float[Tensor, " P"]:
    """r_w / |y_w| - r_l / |y_l|."""
    return chosen.log_ratio / chosen.tokens - rejected.log_ratio / rejected.tokens


def ipo(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Float[Tensor, " P"]:
    """(m - 1 / (2 beta))^2, m = `ipo_margin`. Source: arXiv:2310.12036, equation 17.

    Departs from the paper, whose ratios are sums: here they are means per token, as the authors advised TRL, so that
    the target 1 / (2 beta) does not depend on lengths.
    """
    return (ipo_margin(chosen, rejected) - 1 / (2 * beta)).square()


def simpo_margin(chosen: Side, rejected: Side, *, beta: float = 2.0) -> Float[Tensor, " P"]:
    """beta (a_w - a_l)."""
    return beta * (chosen.token_log_p - rejected.token_log_p)


def simpo(chosen: Side, rejected: Side, *, beta: float = 2.0, gamma: float = 1.0) -> Float[Tensor, " P"]:
    """-log sigma(m - gamma), m = `simpo_margin`; it reads no reference. Source: arXiv:2405.14734, equation 6.

    The paper's gamma is this `gamma`; TRL's option `simpo_gamma` is the same number.
    """
    return -logsigmoid(simpo_margin(chosen, rejected, beta=beta) - gamma)


def orpo_margin(chosen: Side, rejected: Side) -> Float[Tensor, " P"]:
    """The log of the odds ratio of both answers."""
    return chosen.log_odds - rejected.log_odds


def orpo(chosen: Side, rejected: Side, *, weight: float = 0.1) -> Float[Tensor, " P"]:
    """-a_w - weight log sigma(m), m = `orpo_margin`; it reads no reference. Source: arXiv:2403.07691, equations 6, 7.

    Departs from TRL, whose first summand also trains the prompt: here it is the answer's loss, as in the paper.
    """
    return -chosen.token_log_p - weight * logsigmoid(orpo_margin(chosen, rejected))


def kto_margin(
    side: Side, label: Bool[Tensor, " P"], baseline: Float[Tensor, " P"], *, beta: float = 0.1
) -> Float[Tensor, " P"]:
    """beta (r - z) of a desirable answer, beta (z - r) of an undesirable one."""
    return beta * torch.where(label, side.log_ratio - baseline, baseline - side.log_ratio)


def kto(
    side: Side, label: Bool[Tensor, " P"], baseline: Float[Tensor, " P"], *, beta: float = 0.1
) -> Float[Tensor, " P"]:
    """1 - sigma(m), m = `kto_margin`. Source: arXiv:2402.01306, equation 8, with both of its weights at 1.

    `label` is True for a desirable answer. `baseline` is z, an estimate of KL(pi || pi_ref), at least 0, without a
    gradient.
    """
    return torch.sigmoid(-kto_margin(side, label, baseline, beta=beta))
