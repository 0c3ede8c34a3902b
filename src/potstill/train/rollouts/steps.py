"""Applies a rollout of either kind to the passes of an optimizer step, and reads what it did."""

from collections.abc import Sequence

import torch

from potstill.core.types import Batch
from potstill.train import distributed
from potstill.train.rollouts.base import TALLY_NAMES, Rollout, StepRollout, make_generator
from potstill.train.training_module import TrainingModule

AnyRollout = Rollout | StepRollout


@torch.no_grad()
def roll_out_step(
    rollout: AnyRollout, batches: Sequence[Batch], module: TrainingModule, *, seed: int, step: int, rank: int
) -> list[Batch]:
    """The passes of this rank with the documents that the rollout wrote."""
    with module.autocast(batches[0]["input_ids"].device):
        if isinstance(rollout, StepRollout):
            return rollout.roll_out(batches, module.student, step=step)
        generator = make_generator(seed, step, rank)
        return [rollout(batch, module.student, module.frozen_models_by_name, generator) for batch in batches]


def get_updates(rollout: AnyRollout | None) -> int | None:
    """The number of optimizer steps that train on what a rollout of steps wrote; None for every other rollout."""
    return rollout.updates if isinstance(rollout, StepRollout) else None


def pop_metrics(rollout: AnyRollout | None) -> dict[str, int | float]:
    """What the rollout did since the last call, on all ranks together, as fields of `metrics.jsonl`."""
    if rollout is None:
        return {}
    if isinstance(rollout, StepRollout):
        return {**rollout.summarize(distributed.sum_over_ranks(rollout.pop_totals()))}
    totals = distributed.sum_over_ranks({f"rollout_{name}": rollout.tally[name] for name in TALLY_NAMES})
    rollout.tally.clear()
    return totals
