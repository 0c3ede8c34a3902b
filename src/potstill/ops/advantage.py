"""Advantages from rewards of tokens: the mean reward from each token onward, centered and scaled.

Source: Gu et al., "MiniLLM" (arXiv:2306.08543), section 2.2 (length normalization), and the authors' code.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def returns_to_go(
    rewards: Float[Tensor, " N"], segment: Int[Tensor, " N"], *, discount: float = 1.0
) -> Float[Tensor, " N"]:
    """R_t = (sum_{k >= t} discount^(k - t) r_k) / (number of k >= t), within each run of equal `segment`.

    Source: MiniLLM's code, which starts the sum at the token's own reward.
    Departs from the paper: its equation (5) starts at the next token, and the single-step term has the token's own.
    """
    returns, total, count = torch.empty_like(rewards), 0.0, 0
    segments, values = segment.tolist(), rewards.tolist()
    for n in reversed(range(len(values))):
        if n + 1 == len(values) or segments[n + 1] != segments[n]:
            total, count = 0.0, 0
        total, count = values[n] + discount * total, count + 1
        returns[n] = total / count
    return returns


def whiten(values: Float[Tensor, " N"], *, eps: float = 1e-8) -> Float[Tensor, " N"]:
    """(x - mean) / sqrt(variance + eps); zeros for fewer than two values."""
    if len(values) < 2:
        return torch.zeros_like(values)
    return (values - values.mean()) / torch.sqrt(values.var(unbiased=False) + eps)
