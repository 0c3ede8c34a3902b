"""Uniform noise for input embeddings (NEFTune), which follows from the seed, the step and the document alone.

    x_t + alpha / sqrt(T D) u_t        u_t ~ U(-1, 1)^D

T is the length of the token's own document, and D the width of the embeddings. A counter gives u: number d of token t
is a hash of the seed, the step, the ids and positions of the document, t and d. So a document gets the same noise in
any pass, on any rank and in any layout, and no generator has a state to restore.

Source: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning" (arXiv:2310.05914), Algorithm 1. The
hash is the finalizer of SplitMix64 (Steele et al., 2014, Figure 5). In the paper T is the padded length of the batch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: the distance of SplitMix64's counter
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
NOISE_BITS = 23  # with a half step, so that no number is 0 or -1, they are the 24 bits of a float32


def wrap(number: int) -> int:
    """The signed 64-bit integer with the same bits as `number` modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63


def mix_bits(numbers: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """The finalizer of SplitMix64 on 64-bit integers, modulo 2^64: one bit changed in changes half of those out."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        numbers = numbers ^ ((numbers >> shift) & ((1 << (64 - shift)) - 1))  # a logical shift: torch's keeps the sign
        numbers = numbers if multiplier == 1 else numbers * wrap(multiplier)
    return numbers


def hash_tokens(
    input_ids: Int[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"],
    documents: Int[Tensor, "B T"],
    *,
    seed: int,
    step: int,
) -> Int[Tensor, "B T"]:
    """The key of each token: a hash of its position and of the ids, positions, seed and step of its document."""
    places = mix_bits((position_ids + 1) * wrap(GOLDEN))
    bins = documents.flatten() + 1  # padding, the document -1, has a bin of its own
    sums = input_ids.new_zeros(int(bins.max()) + 1).index_add_(0, bins, mix_bits(input_ids ^ places).flatten())
    run = mix_bits(mix_bits(torch.tensor(wrap(seed * GOLDEN))) ^ (step + 1)).to(input_ids.device)
    return mix_bits(mix_bits(sums ^ run)[bins].view_as(input_ids) + places)


def compute_noise_scales(
    position_ids: Int[Tensor, "B T"], documents: Int[Tensor, "B T"], *, alpha: float
) -> Float[Tensor, "B T"]:
    """alpha / sqrt(T) at each token, with T the last position of its document plus one; 0 at padding.

    A continuation that starts at a position p > 0, behind the prompt that it shares, so counts with its prompt.
    """
    bins = documents.flatten() + 1
    lengths = position_ids.new_zeros(int(bins.max()) + 1)
    lengths = lengths.scatter_reduce_(0, bins, position_ids.flatten() + 1, "amax")[bins].view_as(position_ids)
    return (alpha * lengths.clamp(min=1).rsqrt()).masked_fill(documents < 0, 0.0)


def draw_noise(keys: Int[Tensor, "B T"], scales: Float[Tensor, "B T"], width: int) -> Float[Tensor, "B T D"]:
    """scale / sqrt(D) u, with u of `width` D odd multiples of 2^-24 in (-1, 1)."""
    counters = torch.arange(1, width + 1, device=keys.device) * wrap(GOLDEN)
    bits = mix_bits(keys[..., None] + counters) >> (63 - NOISE_BITS)  # from -2^23 to 2^23 - 1
    return (bits * 2 + 1).float() * (scales[..., None] * (2.0 ** -(NOISE_BITS + 1) * width**-0.5))
