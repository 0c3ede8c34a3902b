"""Which parameters one optimiser treats alike."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float) -> list[dict[str, Any]]:
    """The groups `decay` (matrices), `no_decay` (norms and biases) and `objective` (projectors), those not empty.

    A vector is no map: pulling a norm's weight towards 0 shrinks what it lets through, and an objective's own weights
    are thrown away at the end, so neither decays.
    """
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "weight_decay": weight_decay if name == "decay" else 0.0}
        for name in ("decay", "no_decay", "objective")
    }
    for name, parameter in named:
        if parameter.requires_grad:
            groups[_group_of(name, parameter)]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if name.removeprefix("module.").startswith("objective."):  # DDP puts "module." in front
        return "objective"
    return "decay" if parameter.ndim >= 2 else "no_decay"
