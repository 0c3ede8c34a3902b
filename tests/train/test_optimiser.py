"""Which weights decay."""

import pytest
import torch
from torch import nn

from potstill.train.optimiser import parameter_groups


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
        self.objective = nn.Linear(4, 4)
        self.student[2].weight.requires_grad_(False)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_matrices_decay_and_norms_biases_and_objectives_do_not(prefix: str) -> None:
    module = Pair()
    named = [(prefix + name, p) for name, p in module.named_parameters()]
    groups = {group["name"]: group for group in parameter_groups(named, weight_decay=0.3)}
    assert [group["weight_decay"] for group in groups.values()] == [0.3, 0.0, 0.0]
    sizes = {name: [tuple(p.shape) for p in group["params"]] for name, group in groups.items()}
    assert sizes == {"decay": [(4, 4)], "no_decay": [(4,), (4,), (4,)], "objective": [(4, 4), (4,)]}


def test_an_optimiser_takes_the_groups_and_an_empty_one_is_left_out() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    groups = parameter_groups([("student.w", weight)], weight_decay=0.5)
    assert [group["name"] for group in groups] == ["decay"]
    optimiser = torch.optim.AdamW(groups, lr=0.1)
    weight.grad = torch.zeros_like(weight)
    optimiser.step()
    torch.testing.assert_close(weight.data, torch.full((2, 2), 1 - 0.1 * 0.5))
