"""Which weights decay, which climb, and which rest."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tests.train.small import settings, some_packs, study_of
from torch import nn
from transformers import LlamaForCausalLM

from potstill.core.types import Batch, Needs, ParamGroup, Signals, Terms, supervised_positions
from potstill.data.packing import collate
from potstill.train.optimizer import parameter_groups, prepare_gradients
from potstill.train.run import read_run_metrics, train


def groups_of(objective: nn.Module, rate: float = 0.1) -> dict[str, dict[str, object]]:
    student = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    student[2].weight.requires_grad_(False)
    found = parameter_groups(student, objective, rate=rate, weight_decay=0.3)
    return {group["name"]: group for group in found}


def test_matrices_decay_and_norms_biases_and_objectives_do_not() -> None:
    groups = groups_of(nn.Linear(4, 4))
    assert [group["weight_decay"] for group in groups.values()] == [0.3, 0.0, 0.0]
    sizes = {name: [tuple(p.shape) for p in group["params"]] for name, group in groups.items()}  # type: ignore[attr-defined]
    assert sizes == {"decay": [(4, 4)], "no_decay": [(4,), (4,), (4,)], "objective": [(4, 4), (4,)]}


def test_an_optimiser_takes_the_groups_and_an_empty_one_is_left_out() -> None:
    groups = parameter_groups(nn.Linear(2, 2, bias=False), object(), rate=0.1, weight_decay=0.5)
    assert [group["name"] for group in groups] == ["decay"]
    optimiser = torch.optim.AdamW(groups)
    (weight,) = groups[0]["params"]
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimiser.step()
    torch.testing.assert_close(weight.data, before * (1 - 0.1 * 0.5))


class Critic(nn.Linear):
    group = ParamGroup("critic", rate=3.0, sign=-1, interval=2)


class Outer(nn.Module):
    group = ParamGroup("projectors", rate=2.0)

    def __init__(self) -> None:
        super().__init__()
        self.map, self.critic = nn.Linear(2, 2), Critic(2, 1)


def test_a_weight_belongs_to_the_innermost_module_with_a_group() -> None:
    groups = groups_of(nn.Sequential(Outer(), nn.Linear(1, 1)), rate=0.1)
    assert {name: (len(g["params"]), g["lr"], g["sign"], g["every"]) for name, g in groups.items()} == {  # type: ignore[arg-type]
        "decay": (1, 0.1, 1, 1),
        "no_decay": (3, 0.1, 1, 1),
        "objective": (2, 0.1, 1, 1),
        "projectors": (2, 0.2, 1, 1),
        "critic": (2, pytest.approx(0.3), -1, 2),
    }


def test_a_group_that_rests_moves_at_every_second_step_and_one_that_climbs_goes_up() -> None:
    objective, values = Critic(1, 1, bias=False), []
    optimiser = torch.optim.SGD(parameter_groups(nn.Linear(1, 1), objective, rate=0.1, weight_decay=0.0))
    optimiser.register_step_pre_hook(prepare_gradients)
    start = objective.weight.item()
    for _ in range(4):
        optimiser.zero_grad()
        objective.weight.sum().backward()
        optimiser.step()
        values.append(objective.weight.item() - start)
    assert values == pytest.approx([0.0, 0.3, 0.3, 0.6])


class Game(nn.Module):
    """sum over rows of critic(h): the critic climbs it, the student goes down, in one backward."""

    additive: ClassVar[bool] = True
    weights: ClassVar[dict[str, float]] = {"game": 1.0}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.critic = Critic(width, 1)

    def needs(self, batch: Batch) -> dict[str, Needs]:
        return {"student": Needs(supervised_positions(batch)[0])}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"game": len(supervised_positions(batch)[1])}

    def forward(self, views: dict[str, Signals], frozen: dict[str, Signals], batch: Batch) -> Terms:
        return {"game": self.critic(views["student"].rows).sum()}


@pytest.mark.parametrize(("steps", "moves"), [(1, False), (2, True)])
def test_a_critic_is_trained_against_the_student_in_one_backward(
    steps: int, moves: bool, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    game = Game(32)
    bias, study = game.critic.bias.item(), study_of(tiny_llama, objective=game)
    batch, first = collate([some_packs()[0]]), [p.detach().clone() for p in game.critic.parameters()]
    before = study(**batch)["loss"].item()
    train(study, some_packs(), settings(tokens=64 * steps, warmup=0.0), tmp_path, show=False)
    assert (game.critic.bias.item() > bias) is moves, "it climbs what it says itself, at every second step"
    with torch.no_grad():
        for parameter, was in zip(game.critic.parameters(), first, strict=True):
            parameter.copy_(was)
    assert study(**batch)["loss"].item() < before, "the student goes down what the critic said"


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_what_rests_has_no_part_in_the_norm(clip: float, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    game, norms = Game(32), []
    for folder, trained in (("critic", True), ("constant", False)):
        game.critic.requires_grad_(trained)
        study = study_of(tiny_llama, objective=game)
        train(study, some_packs(), settings(tokens=64, warmup=0.0, clip=clip), tmp_path / folder, show=False)
        (line,) = read_run_metrics(tmp_path / folder)
        norms.append(line["grad_norm"])
    assert norms[0] == norms[1]
