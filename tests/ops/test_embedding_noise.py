"""Noise on embeddings: its bound and distribution, and that it follows from seed, step and document alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.ops.embedding_noise import compute_noise_scales, draw_noise, hash_tokens, mix_bits, wrap


def packed(*documents: list[int]) -> dict[str, Tensor]:
    """Documents end to end, as one row."""
    return {
        "input_ids": torch.tensor([[i for ids in documents for i in ids]]),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in documents])[None],
        "documents": torch.tensor([[n for n, ids in enumerate(documents) for _ in ids]]),
    }


def draw(batch: dict[str, Tensor], *, width: int = 8, seed: int = 1, step: int = 3, alpha: float = 5.0) -> Tensor:
    keys = hash_tokens(**batch, seed=seed, step=step)
    scales = compute_noise_scales(batch["position_ids"], batch["documents"], alpha=alpha)
    return draw_noise(keys, scales, width)[0]


def splitmix(number: int) -> int:
    """The finalizer of SplitMix64, as published, in Python's integers."""
    number %= 2**64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return number ^ (number >> 31)


def test_bits_are_mixed_as_splitmix64_mixes_them() -> None:
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64]
    assert mix_bits(torch.tensor(numbers)).tolist() == [wrap(splitmix(number)) for number in numbers]
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 with the seed 0


def test_the_bound_of_512_tokens_and_width_3072_at_alpha_5_is_0_003987() -> None:
    noise = draw(packed(list(range(512))), width=3072)
    assert float(noise.abs().max()) <= 5 / (512 * 3072) ** 0.5 == pytest.approx(0.003987, abs=1e-6)
    assert float(noise.abs().max()) > 0.003986


def test_noise_is_uniform_and_no_two_numbers_go_together() -> None:
    noise = draw(packed(list(range(400))), width=256) * (400 * 256) ** 0.5 / 5
    assert noise.mean().abs() < 4 / (3 * noise.numel()) ** 0.5
    assert float((noise**2).mean()) == pytest.approx(1 / 3, abs=0.005)
    quarters = torch.histc(noise, 4, -1, 1) / noise.numel()
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.006, rtol=0)
    correlations = torch.corrcoef(noise).fill_diagonal_(0), torch.corrcoef(noise.T).fill_diagonal_(0)
    assert all(float(values.abs().max()) < 0.35 for values in correlations)


def test_the_noise_of_a_document_depends_on_its_own_length_and_not_on_its_neighbors() -> None:
    first, second = list(range(5, 21)), [7, 9, 4, 200]
    together, reverse = draw(packed(first, second)), draw(packed(second, first))
    torch.testing.assert_close(together[:16], draw(packed(first)), rtol=0, atol=0)
    torch.testing.assert_close(together[16:], draw(packed(second)), rtol=0, atol=0)
    torch.testing.assert_close(reverse, torch.cat([together[16:], together[:16]]), rtol=0, atol=0)
    assert float(together[:16].abs().max()) < 5 / (16 * 8) ** 0.5 < float(together[16:].abs().max()) * 1.1


def test_another_step_seed_or_token_gives_other_noise_everywhere() -> None:
    batch = packed([3, 1, 4, 1, 5])
    noise = draw(batch)
    assert torch.equal(noise, draw(batch))
    changes: list[dict[str, Any]] = [{"step": 4}, {"seed": 2}, {"seed": 4, "step": 0}]
    others = [draw(batch, **change) for change in changes] + [draw(packed([3, 1, 4, 1, 6]))]
    assert all((noise != other).all() for other in others)
    assert (noise[1] != noise[3]).all()  # the same token at another position


def test_swapping_two_tokens_changes_the_noise() -> None:
    assert (draw(packed([3, 1, 4])) != draw(packed([1, 3, 4]))).all()


def test_a_continuation_counts_with_the_prompt_that_it_shares() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5]]),
        "documents": torch.tensor([[0, 0, 0, 1, 1, 1]]),
    }
    scales = compute_noise_scales(batch["position_ids"], batch["documents"], alpha=6.0)
    torch.testing.assert_close(scales**2, torch.tensor([[12.0, 12, 12, 6, 6, 6]]))


def test_padding_gets_no_noise() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [5, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 2], [0, 0, 0]]),
        "documents": torch.tensor([[0, 0, 0], [1, -1, -1]]),
    }
    scales = compute_noise_scales(batch["position_ids"], batch["documents"], alpha=1.0)
    torch.testing.assert_close(scales, torch.tensor([[3**-0.5] * 3, [1.0, 0, 0]]))
    assert not draw_noise(hash_tokens(**batch, seed=1, step=1), scales, 4)[1, 1:].any()
