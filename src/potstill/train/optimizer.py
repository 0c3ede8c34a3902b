"""Groups parameters for the optimizer, and prepares their gradients for a step."""

from typing import Any

import torch
from torch import nn

from potstill.core.types import HasParamGroup, ParamGroup


def parameter_groups(
    student: nn.Module, objective: object, *, rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The groups `decay` (matrices) and `no_decay` (norms and biases) of the student, then those of the objective.

    Weight decay applies to the student's matrices only. Decay on a norm's weight would shrink its output, and an
    objective's own weights are discarded after training. Groups without a parameter are left out.
    """
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "lr": rate, "weight_decay": decay, "sign": 1, "every": 1, "seen": 0}
        for name, decay in (("decay", weight_decay), ("no_decay", 0.0))
    }
    for parameter in student.parameters():
        if parameter.requires_grad:
            groups["decay" if parameter.ndim >= 2 else "no_decay"]["params"].append(parameter)
    for parameter, group in _list_objective_parameters(objective):
        defaults = {"name": group.name, "params": [], "lr": rate * group.rate, "weight_decay": 0.0, "seen": 0}
        groups.setdefault(group.name, defaults | {"sign": group.sign, "every": group.interval})["params"].append(
            parameter
        )
    return [group for group in groups.values() if group["params"]]


def drop_resting_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Clear the gradients of groups that skip the coming step. Call it before clipping, so its norm excludes them."""
    for group in optimizer.param_groups:
        if (group["seen"] + 1) % group["every"] != 0:
            for parameter in group["params"]:
                parameter.grad = None


def prepare_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Prepare for a step: clear the gradients of groups that skip it, and negate those of groups that maximize.

    Each group counts its steps in `seen`, which checkpoints keep.
    """
    drop_resting_gradients(optimizer)
    for group in optimizer.param_groups:
        group["seen"] += 1
        for parameter in group["params"]:
            if group["sign"] < 0 and parameter.grad is not None:
                parameter.grad.neg_()


def _list_objective_parameters(objective: object) -> list[tuple[nn.Parameter, ParamGroup]]:
    """Each trained parameter of the objective, with the group of the innermost module that has one."""
    if not isinstance(objective, nn.Module):
        return []
    groups = {parameter: ParamGroup() for parameter in objective.parameters() if parameter.requires_grad}
    for module in objective.modules():  # outer ones first
        if isinstance(module, HasParamGroup):
            groups |= {parameter: module.group for parameter in module.parameters() if parameter in groups}
    return list(groups.items())
