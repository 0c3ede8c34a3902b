"""Advantages from rewards: of tokens, the mean reward from each token onward; of samples, relative to their group.

Sources: Gu et al., "MiniLLM" (arXiv:2306.08543), section 2.2 (length normalization), and the authors' code;
Shao et al., "DeepSeekMath" (arXiv:2402.03300), section 4.1.2, for groups.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from potstill.ops.likelihood import sum_groups

Scale = Literal["group", "batch", "none"]  # what the centered rewards are divided by: a standard deviation, or nothing
SCALES: tuple[str, ...] = get_args(Scale)


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


def compute_group_advantages(
    rewards: Float[Tensor, " D"],
    groups: Int[Tensor, " D"],
    *,
    scale: str = "group",
    eps: float = 1e-6,
    leave_one_out: bool = False,
) -> Float[Tensor, " D"]:
    """(R_i - b_i) / (s_i + eps) for samples in groups, such as the answers to one prompt.

        b_i = mean of the group's rewards, or with `leave_one_out` the mean of its other rewards
        s_i = the standard deviation of the group (`group`) or of all rewards (`batch`), unbiased;  no divisor: `none`

    A standard deviation has the divisor n - 1, as in verl and TRL. Equal rewards have the advantage 0. The advantages
    of a group sum to 0, and a constant added to its rewards changes nothing. Leaving one out is the factor n / (n - 1).

    Raises: ValueError for an unknown scale, or a group of one sample, which has nothing to be compared with.

    Sources: DeepSeekMath (arXiv:2402.03300), equation 3 (`group`); Liu et al., "Understanding R1-Zero-Like Training"
    (arXiv:2503.20783), section 3 (`none`); Ahmadian et al., "Back to Basics" (arXiv:2402.14740), equation 8
    (`leave_one_out`).
    """
    if scale not in SCALES:
        raise ValueError(f"the scale of advantages is {scale!r}; choose one of {', '.join(SCALES)}")
    numbers, members = groups.unique(return_inverse=True)
    sizes = torch.bincount(members, minlength=len(numbers))
    if len(sizes) and int(sizes.min()) < 2:
        number = int(numbers[sizes.argmin()])
        raise ValueError(f"group {number} has one sample, and an advantage compares samples; draw at least 2 of each")
    means = sum_groups(rewards, members, len(numbers)) / sizes
    centered = (rewards - means[members]).masked_fill(find_flat(rewards, members)[members], 0.0)
    if scale == "group":
        variances = sum_groups(centered.square(), members, len(numbers)) / (sizes - 1)
        centered = centered / (variances.sqrt() + eps)[members]
    elif scale == "batch" and len(rewards):
        centered = centered / (rewards.std() + eps)
    return centered * (sizes / (sizes - 1))[members] if leave_one_out else centered


def find_flat(rewards: Float[Tensor, " D"], groups: Int[Tensor, " D"]) -> Bool[Tensor, " G"]:
    """Whether all rewards of group g are equal, for the groups 0 to G - 1; such a group teaches nothing."""
    count = int(groups.max()) + 1 if len(groups) else 0
    lowest, highest = (
        rewards.new_full((count,), math.nan).scatter_reduce(0, groups, rewards, reduction, include_self=False)
        for reduction in ("amin", "amax")
    )
    return lowest == highest
