"""Returns, their whitening and advantages in groups: numbers by hand, literal definitions and laws."""

import statistics
from itertools import product

import pytest
import torch
from torch import Tensor

from potstill.ops.advantage import SCALES, compute_group_advantages, find_flat, returns_to_go, whiten

REWARDS = torch.tensor([-1.0, -1, 0, 0, 1, 1.5, 2, 0], dtype=torch.float64)
ADVANTAGES = [-1.193269, -1.193269, -0.284112, -0.284112, 0.625046, 1.079624, 1.534203, -0.284112]


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


def random_groups(*, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards of groups of 2 to 6 samples, in any order; the numbers of the groups have gaps."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor([7] * 2 + [0] * 6 + [3] * 5 + [20] * 3)[torch.randperm(16, generator=generator)]
    return torch.randn(16, generator=generator, dtype=torch.float64) * 3 + 1, groups


def test_a_group_of_eight_has_the_advantages_of_the_sheet() -> None:
    assert compute_group_advantages(REWARDS, torch.zeros(8, dtype=torch.long)).tolist() == pytest.approx(
        ADVANTAGES, abs=1e-6
    )


def test_each_scale_is_its_definition() -> None:
    rewards, groups = random_groups()
    of_all = statistics.stdev(rewards.tolist())
    for scale, leave_one_out in product(SCALES, (False, True)):
        found = compute_group_advantages(rewards, groups, scale=scale, leave_one_out=leave_one_out)
        for i, (reward, group) in enumerate(zip(rewards.tolist(), groups.tolist(), strict=True)):
            members = rewards[groups == group].tolist()
            others = [value for j, value in enumerate(rewards.tolist()) if groups[j] == group and j != i]
            divisor = {"group": statistics.stdev(members) + 1e-6, "batch": of_all + 1e-6, "none": 1.0}[scale]
            baseline = statistics.fmean(others if leave_one_out else members)
            assert found[i].item() == pytest.approx((reward - baseline) / divisor), scale


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_the_advantages_of_a_group_sum_to_zero_and_a_shift_of_its_rewards_changes_nothing(
    scale: str, leave_one_out: bool
) -> None:
    rewards, groups = random_groups(seed=1)
    found = compute_group_advantages(rewards, groups, scale=scale, leave_one_out=leave_one_out)
    for group in groups.unique():
        assert found[groups == group].sum().item() == pytest.approx(0, abs=1e-12)
    shifted = compute_group_advantages(rewards + 40.0, groups, scale=scale, leave_one_out=leave_one_out)
    torch.testing.assert_close(shifted, found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_have_no_advantage_whatever_their_rounding(scale: str) -> None:
    rewards, groups = torch.tensor([0.1] * 3 + [0.7] * 7 + [0.0, 1.0]), torch.tensor([0] * 3 + [1] * 7 + [2] * 2)
    assert compute_group_advantages(rewards, groups, scale=scale)[:10].tolist() == [0.0] * 10
    assert find_flat(rewards, groups).tolist() == [True, True, False]


def test_leaving_one_out_multiplies_the_centered_reward_by_n_over_n_minus_one() -> None:
    rewards, groups = random_groups(seed=2)
    sizes = torch.stack([(groups == group).sum() for group in groups])
    expected = compute_group_advantages(rewards, groups, scale="none") * sizes / (sizes - 1)
    torch.testing.assert_close(compute_group_advantages(rewards, groups, scale="none", leave_one_out=True), expected)


def test_a_group_of_one_and_an_unknown_scale_are_refused() -> None:
    with pytest.raises(ValueError, match="group 4 has one sample"):
        compute_group_advantages(torch.ones(3), torch.tensor([2, 2, 4]))
    with pytest.raises(ValueError, match="'groups'; choose one of group, batch, none"):
        compute_group_advantages(torch.ones(2), torch.tensor([0, 0]), scale="groups")


def test_no_sample_has_no_advantage() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    for scale in SCALES:
        assert compute_group_advantages(torch.zeros(0), empty, scale=scale).tolist() == []
