"""What the ranks of a sharded run do (FSDP2 over gloo on a CPU); started by test_sharding.py, and used by it alone."""

import sys
from pathlib import Path
from typing import Any

import torch
from tests.tiny import byte_tokenizer, random_llama
from tests.train.small import some_packs, study_of
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from potstill.data.packing import collate
from potstill.train import fsdp
from potstill.train.optimizer import parameter_groups
from potstill.train.training_module import TrainingModule

PASSES, STEPS = 4, 4  # passes of a step over all ranks, and steps
CASES = [(tied, shared) for tied in (True, False) for shared in (False, True)]  # is the head tied, the teacher shared


def study(tied: bool) -> TrainingModule:
    """Always the same study, in float64."""
    return study_of(random_llama(byte_tokenizer(), tied=tied).double())


def optimiser_of(model: TrainingModule) -> torch.optim.Optimizer:
    """AdamW over the trainer's own groups."""
    return torch.optim.AdamW(parameter_groups(model.student, model.objective, rate=1e-2, weight_decay=0.1))


def trained(
    model: TrainingModule, optimiser: torch.optim.Optimizer, steps: range, *, rank: int = 0, ranks: int = 1
) -> Any:
    """The losses, gradient norms and first gradients of `steps` in which this rank takes its share of the passes."""
    packs = some_packs()
    losses, norms, gradients = [], [], {}
    for step in steps:
        batches = [collate([packs[step * PASSES + i]]) for i in range(PASSES)]
        counts = torch.stack([model.counts(batch) for batch in batches]).sum(0)
        mine = torch.zeros((), dtype=torch.float64)
        for batch in batches[rank::ranks]:
            loss = model(**batch, num_items_in_batch=counts)["loss"]
            loss.backward()
            mine += loss.detach()
        if ranks > 1:
            distributed.all_reduce(mine)
        losses.append(mine.item())
        gradients = gradients or {name: whole(weight.grad) for name, weight in model.named_parameters()}
        norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item())
        optimiser.step()
        optimiser.zero_grad()
    return losses, norms, gradients


def whole(tensor: Any) -> Tensor:
    """A tensor that may be shared out, gathered."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def sharded(tied: bool, teacher: bool, mesh: DeviceMesh) -> tuple[TrainingModule, torch.optim.Optimizer]:
    """The study shared out, with its optimiser."""
    model = study(tied)
    if teacher:
        fsdp.shard_frozen_model(model._frozen_models["teacher"], mesh)
    fsdp.shard_module(model, mesh)
    return model, optimiser_of(model)


def main(out: Path) -> None:
    """Trains every case with a checkpoint in its middle, goes on from that, and leaves what came of it."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    found = {}
    for number, case in enumerate(CASES):
        model, optimiser = sharded(*case, mesh)
        local = sum(weight.to_local().numel() for weight in model.parameters())
        told = trained(model, optimiser, range(2), rank=rank, ranks=ranks)
        fsdp.save_sharded(model, optimiser, out / f"checkpoint-{number}")
        later = trained(model, optimiser, range(2, STEPS), rank=rank, ranks=ranks)
        again, other = sharded(*case, mesh)
        fsdp.load_sharded(again, other, out / f"checkpoint-{number}")
        trained(again, other, range(2, STEPS), rank=rank, ranks=ranks)
        found[case] = {
            "losses": told[0] + later[0],
            "norms": told[1] + later[1],
            "gradients": told[2],
            "weights": fsdp.gather_weights(model),
            "resumed": fsdp.gather_weights(again),
            "local": local,
        }
    torch.save(found, out / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
