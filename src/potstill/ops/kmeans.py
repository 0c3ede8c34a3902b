"""Weighted k-means clustering (Lloyd, 1982)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROUNDS = 8


def kmeans(vectors: Float[Tensor, "V F"], weight: Float[Tensor, " V"], classes: int, *, seed: int) -> Int[Tensor, " V"]:
    """The cluster of each vector, by Lloyd's algorithm (1982) from centers drawn by weight.

    Minimizes sum_v weight[v] |vectors[v] - center[cluster of v]|^2, to a local minimum.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = weight + 1e-9 * weight.sum() + 1e-30  # so that vectors can be drawn even if all weights are 0
    seeds = torch.multinomial(weight, min(classes, len(vectors)), generator=generator)
    centers = vectors[seeds].clone()
    for _ in range(ROUNDS):
        nearest = _find_nearest(vectors, centers)
        sums = torch.zeros_like(centers).index_add_(0, nearest, vectors * weight[:, None])
        mass = torch.zeros_like(centers[:, 0]).index_add_(0, nearest, weight)
        centers = torch.where(mass[:, None] > 0, sums / mass.clamp_min(1e-30)[:, None], centers)
    return _find_nearest(vectors, centers)


def _find_nearest(vectors: Float[Tensor, "V F"], centers: Float[Tensor, "C F"]) -> Int[Tensor, " V"]:
    return ((centers * centers).sum(-1) - 2 * vectors @ centers.T).argmin(-1)
