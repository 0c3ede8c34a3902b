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

from potstill.models.signals import unwrap_model
from potstill.train.activation_checkpointing import find_blocks
from potstill.train.training_module import TrainingModule


def shard_module(module: TrainingModule, mesh: DeviceMesh) -> TrainingModule:
    """`study` in place, with every block of its student shared out over `mesh`, and all else at the root.

    Gradients are summed over ranks and not averaged: each rank divides its sums by the counts of the whole step. An
    optimiser is made afterwards, from the parameters as they then are. Frozen models are left as they are.

    Raises: UnsupportedModel where no list of blocks is found.
    """
    for block in find_blocks(module.student):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.set_gradient_divide_factor(1.0)
    return module


def shard_frozen_model(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A teacher in place, with every block shared out over `mesh` and gathered for its part of each forward alone.

    Embedding, last norm and head stay whole on every rank, since the loss asks for logits after the forward.

    Raises: UnsupportedModel where no list of blocks is found.
    """
    model.requires_grad_(False)
    plain_model = unwrap_model(model)
    block_list = find_blocks(plain_model)
    for block in block_list:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    sharded_ids = {id(weight) for block in block_list for weight in block.parameters()}
    unsharded_weights = {weight for weight in plain_model.parameters() if id(weight) not in sharded_ids}
    fully_shard(
        plain_model.base_model, mesh=mesh, ignored_params=unsharded_weights
    )  # a root, so that the next block is fetched early
    return model


def gather_weights(module: TrainingModule) -> dict[str, Tensor]:
    """The student's weights whole, on every rank, as a stock `state_dict` for `save_pretrained`."""
    return {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight
        for name, weight in module.student.state_dict().items()
    }


def save_sharded(module: TrainingModule, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes weights and optimiser states to `folder`, each rank its own share."""
    weights, states = get_state_dict(module, optimizer)
    state_dict_saver.save({"study": weights, "optimiser": states}, checkpoint_id=folder)


def load_sharded(module: TrainingModule, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Takes back what `save` wrote, shared out over as many ranks as there are now, or in one process unshared."""
    weights, states = get_state_dict(module, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in one process that is meant
        state_dict_loader.load({"study": weights, "optimiser": states}, checkpoint_id=folder)
    set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=states)
