"""The next tokens of several texts at once, each from its own noise, and from one model's logits or those of several.

Several models write together: tokens are then drawn from the weighted mean of their distributions,

    P = sum_k w_k softmax(logits_k / temperature)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.decode.sampling import Sampling, penalize_repetition, token_probabilities
from potstill.ops.categorical import find_likeliest, sample_tokens


class DrawPoint(NamedTuple):
    """Where a token is drawn: after `ids`, with `noise` in [0, 1)."""

    ids: Sequence[int]
    noise: float
    sampling: Sampling


def draw_tokens(
    points: Sequence[DrawPoint], logits: Sequence[Float[Tensor, "N V"]], weights: Sequence[float]
) -> list[int]:
    """The token at each point, from the rows of each model's logits."""
    tokens = [0] * len(points)
    for sampling, rows in _group(points):
        group_logits = [_penalize([points[row] for row in rows], part[rows], sampling) for part in logits]
        if sampling.temperature == 0 and len(logits) == 1:
            group_tokens = find_likeliest(group_logits[0])
        else:
            noise = torch.tensor([points[row].noise for row in rows], dtype=torch.float64, device=logits[0].device)
            group_tokens = sample_tokens(_mix(group_logits, weights, sampling), noise)
        for row, token in zip(rows, group_tokens.tolist(), strict=True):
            tokens[row] = token
    return tokens


def compute_probabilities(
    points: Sequence[DrawPoint], logits: Sequence[Float[Tensor, "N V"]], weights: Sequence[float]
) -> Float[Tensor, "N V"]:
    """The distribution that `draw_tokens` draws from at each point, in float64 on the CPU."""
    probabilities = torch.empty(logits[0].shape, dtype=torch.float64)
    for sampling, rows in _group(points):
        group_logits = [_penalize([points[row] for row in rows], part[rows], sampling) for part in logits]
        probabilities[rows] = _mix(group_logits, weights, sampling).cpu()
    return probabilities


def _group(points: Sequence[DrawPoint]) -> list[tuple[Sampling, list[int]]]:
    groups: dict[Sampling, list[int]] = {}
    for row, point in enumerate(points):
        groups.setdefault(point.sampling, []).append(row)
    return list(groups.items())


def _penalize(points: Sequence[DrawPoint], logits: Float[Tensor, "N V"], sampling: Sampling) -> Float[Tensor, "N V"]:
    if sampling.filters.repetition_penalty == 1:
        return logits
    rows = []
    for point, row in zip(points, logits, strict=True):
        ids = torch.tensor([list(point.ids)], device=logits.device)
        rows.append(penalize_repetition(row[None], ids, torch.ones_like(ids, dtype=torch.bool), sampling))
    return torch.cat(rows)


def _mix(logits: Sequence[Float[Tensor, "N V"]], weights: Sequence[float], sampling: Sampling) -> Float[Tensor, "N V"]:
    weighted_logits = zip(weights, logits, strict=True)
    return torch.stack([weight * token_probabilities(rows, sampling) for weight, rows in weighted_logits]).sum(0)
