"""The batches of an evaluation, and the sums of its terms."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments

from potstill.data.packing import collate
from potstill.train.training_module import TrainingModule

EvalBatch = tuple[dict[str, Tensor], bool]  # a batch, and whether it counts


def iterate_eval_batches(
    dataset: Any, args: TrainingArguments, prepare: Callable[[Any], dict[str, Tensor]], *, is_sharded: bool
) -> Iterator[EvalBatch]:
    """This rank's share of the rows, and whether the batch counts.

    No row counts twice, as it would with accelerate's loader, which repeats rows until all ranks have as many. The
    ranks of a sharded model gather its weights together, so a rank with fewer batches runs some that don't count.
    """
    size, ranks = args.per_device_eval_batch_size, args.world_size
    rank_rows = list(range(args.process_index, len(dataset), ranks))
    num_batches = math.ceil(len(rank_rows) / size)
    most_batches = math.ceil(math.ceil(len(dataset) / ranks) / size) if is_sharded else num_batches
    for batch in DataLoader(Subset(dataset, rank_rows), size, collate_fn=collate):
        yield prepare(batch), True
    for _ in range(most_batches - num_batches):
        yield prepare(collate([dataset[0]])), False


def sum_terms(module: TrainingModule, batches: Iterable[EvalBatch]) -> tuple[Tensor, Tensor]:
    """The sums of all terms over the batches that count, and their counts, in float64 on the CPU."""
    sums = torch.zeros(len(module.term_names), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for batch, is_counted in batches:
        batch_sums = module(**batch)["sums"].double().cpu()
        if is_counted:
            sums += batch_sums
            counts += module.counts(batch)
    return sums, counts
