"""A draw without replacement, against its definition."""

from itertools import product

import pytest
import torch

from potstill.ops.categorical import sample_without_replacement


def test_distinct_tokens_follow_the_law_of_successive_draws() -> None:
    p = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    grid = (torch.arange(24, dtype=torch.float64) + 0.5) / 24
    counts: dict[tuple[int, ...], int] = {}
    for noise in product(grid, grid):
        tokens = tuple(sample_without_replacement(p, torch.stack(noise)).tolist())
        counts[tokens] = counts.get(tokens, 0) + 1
    expected = {(a, b): float(p[a] * p[b] / (1 - p[a])) for a in range(3) for b in range(3) if a != b}
    assert {tokens: n / 24**2 for tokens, n in counts.items()} == pytest.approx(expected)


def test_no_more_tokens_are_drawn_than_are_possible() -> None:
    p = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert sample_without_replacement(p, torch.tensor([0.3, 0.9, 0.1])).tolist() == [1]
    assert sample_without_replacement(p, torch.empty(0)).tolist() == []
