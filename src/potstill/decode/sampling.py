"""Draws tokens from given noise, so that each row's text follows from that row's noise alone.

    token = the first v with P(0) + ... + P(v) > u

`u` in [0, 1) is an argument. The text of a row therefore depends neither on the other rows of the batch nor on the
state of a random generator.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: only ids below `vocabulary`, at `temperature` (0 is greedy), until one of `stop` is drawn.

    There is no top-p, top-k or repetition penalty: the tokens follow the model's own distribution.
    """

    vocabulary: int
    stop: frozenset[int]
    temperature: float = 1.0


def token_probabilities(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """The distribution to draw from, in float64, because sums over a large vocabulary lose too much in float32."""
    if sampling.temperature == 0:
        return one_hot(logits.argmax(-1), logits.shape[1]).double()
    return (logits.double() / sampling.temperature).softmax(-1)


def sample_tokens(probabilities: Float[Tensor, "B V"], noise: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token of each row at which the cumulative probability first exceeds the noise."""
    cumulative = probabilities.cumsum(-1)
    threshold = noise.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=probabilities.shape[1] - 1)
