"""Shards a student's weights, gradients and optimizer states over the ranks of a launcher, with FSDP2 (`--shard`).

The `TrainingModule` is FSDP's root. The root has every weight outside of the blocks: the embedding, the last norm, the
head and the objective's own weights. FSDP gathers a root's weights once per pass and keeps them until its backward
ends, so the fused loss reads a whole head. Outside of a pass every weight is a `DTensor`.

Source: Zhao et al., PyTorch FSDP (arXiv:2304.11277); the stages are those of ZeRO (arXiv:1910.02054).
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from potstill.core.errors import UsageError
from potstill.train import distributed
from potstill.train.activation_checkpointing import find_blocks
from potstill.train.config import TrainConfig
from potstill.train.training_module import TrainingModule


def check_sharding(config: TrainConfig, *, lora: int = 0, train: str | None = None, on_policy: float = 0.0) -> None:
    """Refuse a sharded run that cannot work, before it loads a model.

    Raises: UsageError.
    """
    if not config.shard:
        return
    if distributed.world_size() == 1:
        raise UsageError("--shard needs several processes; start the command with torchrun (docs/scale.md)")
    if lora or train is not None:
        flag = "--lora" if lora else "--train"
        raise UsageError(f"{flag} trains few weights, and --shard splits trained weights; omit one of them")
    if on_policy:
        raise UsageError("--on-policy samples texts of different lengths on each rank, which --shard cannot run")
    if config.compile:
        raise UsageError("--compile does not work with --shard; omit one of them")


@contextlib.contextmanager
def shard_for_training(module: TrainingModule, config: TrainConfig) -> Iterator[TrainingModule]:
    """Yields the module to train: `module` itself, or with `config.shard` a sharded one with the same weights.

    While the sharded module trains, the student of `module` uses no memory. Afterwards it has the trained weights,
    whole on every rank. After an error it stays empty, because the other ranks may not join a gather.

    Raises: UnsupportedModel where no list of blocks is found.
    """
    if not config.shard:
        yield module
        return
    device = next(module.student.parameters()).device
    sharded_module = shard_module(module, init_device_mesh(device.type, (distributed.world_size(),)))
    for weight in module.student.parameters():
        weight.data = torch.empty(0, dtype=weight.dtype, device=device)
    yield sharded_module
    for name, weight in gather(sharded_module.student.state_dict(keep_vars=True)).items():
        module.student.get_parameter(name).data = weight


def shard_module(module: TrainingModule, mesh: DeviceMesh) -> TrainingModule:
    """A module with the weights of `module`: each block of its student sharded over `mesh`, and the rest at the root.

    Gradients are averaged over ranks, as in DDP. The optimizer is created afterwards, from the sharded parameters.
    The objective and the frozen models are those of `module`; frozen models stay whole. Every rank shards its own copy,
    so all ranks have to hold the same weights, those of the objective too.

    Raises: UnsupportedModel where no list of blocks is found.
    """
    weights_memo: dict[int, Any] = {id(weight): weight for weight in module.student.parameters()}
    student = copy.deepcopy(module.student, weights_memo)  # new modules that hold the same parameters
    sharded_module = module.with_student(student)
    for block in find_blocks(student):
        fully_shard(block, mesh=mesh)
    fully_shard(sharded_module, mesh=mesh)
    return sharded_module


def gather(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with every sharded tensor whole. All ranks have to call it; tensors that are tied stay tied."""
    whole_tensors: dict[int, Tensor] = {}
    for value in values.values():
        if isinstance(value, DTensor) and id(value) not in whole_tensors:
            whole_tensors[id(value)] = value.full_tensor().detach()
    return {name: whole_tensors.get(id(value), value) for name, value in values.items()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies whole `weights` into a model whose own are sharded or whole. All ranks have to hold the same `weights`."""
    state = model.state_dict(keep_vars=True)
    if not any(isinstance(weight, DTensor) for weight in state.values()):
        model.load_state_dict(weights, strict=True)
        return
    for name, weight in state.items():
        weight.copy_(shard_like(weights[name], weight))


def shard_like(whole: Tensor, sharded: Tensor) -> Tensor:
    """`whole` sharded as `sharded` is, each rank from its own copy; as it is where `sharded` is not sharded."""
    if not isinstance(sharded, DTensor):
        return whole
    whole = whole.to(sharded.device)
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)


def save_whole_states(optimizer: torch.optim.Optimizer) -> None:
    """Lets `state_dict` of `optimizer` return whole tensors, and `load_state_dict` take them. No-op where unsharded.

    All ranks have to call `state_dict` together.
    """

    def gather_states(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict | {"state": {index: gather(state) for index, state in state_dict["state"].items()}}

    def shard_states(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        return state_dict | {
            "state": {
                index: {
                    name: shard_like(value, weights[index]) if value.shape == weights[index].shape else value
                    for name, value in state.items()
                }
                for index, state in state_dict["state"].items()
            }
        }

    optimizer.register_state_dict_post_hook(gather_states)
    optimizer.register_load_state_dict_pre_hook(shard_states)
