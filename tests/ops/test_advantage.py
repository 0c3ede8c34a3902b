"""Returns and their whitening, against numbers worked out by hand and a literal definition."""

import pytest
import torch

from potstill.ops.advantage import returns_to_go, whiten


def test_the_return_is_the_discounted_mean_of_what_follows_in_the_same_document() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 6.0])
    segment = torch.tensor([0, 0, 0, 3, 3])
    found = returns_to_go(rewards, segment, discount=0.5)
    assert found.tolist() == pytest.approx([(1 + 1 + 1) / 3, (2 + 2) / 2, 4.0, (8 + 3) / 2, 6.0])


@pytest.mark.parametrize("discount", [1.0, 0.95])
def test_it_is_the_definition(discount: float) -> None:
    segment = torch.tensor([0] * 7 + [1] * 1 + [4] * 5)
    rewards = torch.randn(13, dtype=torch.float64)
    for t, found in enumerate(returns_to_go(rewards, segment, discount=discount).tolist()):
        after = [k for k in range(t, 13) if segment[k] == segment[t]]
        expected = sum(discount ** (k - t) * rewards[k].item() for k in after) / len(after)
        assert found == pytest.approx(expected)


def test_a_constant_reward_without_discount_is_its_own_return_at_any_length() -> None:
    segment = torch.tensor([0] * 9 + [1] * 2)
    assert returns_to_go(torch.full((11,), 0.7), segment).tolist() == pytest.approx([0.7] * 11)


def test_whitened_values_have_mean_zero_and_variance_one() -> None:
    values = 3 + 5 * torch.randn(50, dtype=torch.float64)
    found = whiten(values)
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert found.var(unbiased=False).item() == pytest.approx(1, rel=1e-6)
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0])
    assert whiten(torch.tensor([4.0])).tolist() == [0.0]
    assert whiten(torch.zeros(0)).tolist() == []
