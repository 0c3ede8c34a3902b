"""A study whose weights, gradients and optimiser states are shared out over ranks: FSDP2 (`fully_shard`).

A `Study` is the root, and holds what no block does: the embedding, the last norm, the head and the objective's own
weights. FSDP gathers a root's weights when its forward begins and keeps them until its backward has ended, so the head
that the fused loss reads there is whole, is gathered once a pass, and its gradient, which the loss accumulates by
itself, is summed and shared out as any other. Outside of the forward every weight is a `DTensor`, the head's too.

Source: Zhao et al., PyTorch FSDP (arXiv:2304.11277); the stages are those of ZeRO (arXiv:1910.02054).
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from potstill.models.signals import plain
from potstill.train.blocks import blocks
from potstill.train.study import Study


def shard(study: Study, mesh: DeviceMesh) -> Study:
    """`study` in place, with every block of its student shared out over `mesh`, and all else at the root.

    Gradients are summed over ranks and not averaged: each rank divides its sums by the counts of the whole step. An
    optimiser is made afterwards, from the parameters as they then are. Frozen models are left as they are.

    Raises: UnsupportedModel where no list of blocks is found.
    """
    for block in blocks(study.student):
        fully_shard(block, mesh=mesh)
    fully_shard(study, mesh=mesh)
    for module in study.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    return study


def shard_frozen(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A teacher in place, with every block shared out over `mesh` and gathered for its part of each forward alone.

    Embedding, last norm and head stay whole on every rank, since the loss asks for logits after the forward.

    Raises: UnsupportedModel where no list of blocks is found.
    """
    model.requires_grad_(False)
    inner = plain(model)
    inside = blocks(inner)
    for block in inside:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    shared = {id(weight) for block in inside for weight in block.parameters()}
    others = {weight for weight in inner.parameters() if id(weight) not in shared}
    fully_shard(inner.base_model, mesh=mesh, ignored_params=others)  # a root, so that the next block is fetched early
    return model


def gathered(study: Study) -> dict[str, Tensor]:
    """The student's weights whole, on every rank, as a stock `state_dict` for `save_pretrained`."""
    return {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight
        for name, weight in study.student.state_dict().items()
    }


def save(study: Study, optimiser: torch.optim.Optimizer, folder: Path) -> None:
    """Writes weights and optimiser states to `folder`, each rank its own share."""
    weights, states = get_state_dict(study, optimiser)
    state_dict_saver.save({"study": weights, "optimiser": states}, checkpoint_id=folder)


def restore(study: Study, optimiser: torch.optim.Optimizer, folder: Path) -> None:
    """Takes back what `save` wrote, shared out over as many ranks as there are now, or in one process unshared."""
    weights, states = get_state_dict(study, optimiser)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in one process that is meant
        state_dict_loader.load({"study": weights, "optimiser": states}, checkpoint_id=folder)
    set_state_dict(study, optimiser, model_state_dict=weights, optim_state_dict=states)
