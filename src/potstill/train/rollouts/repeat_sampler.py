"""The order of prompts for steps that have a fixed number of them, and whose samples several steps may train on."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

from potstill.train.rollouts.base import seed_generator


class RepeatSampler(Sampler[int]):
    """The items of an epoch in random order, in chunks of `size`, each of which comes `repeats` times in a row.

    Items beyond the last whole chunk wait for another epoch. The order follows from `seed` and `get_epoch()`, so a
    resumed run has the same. A loader that skips batches does not pass `set_epoch` on, hence `get_epoch`. There must be
    at least one chunk of items.
    """

    def __init__(self, num_items: int, *, size: int, repeats: int, seed: int, get_epoch: Callable[[], int]) -> None:
        assert num_items >= size, "a stage refuses steps of more prompts than there are"
        self.num_items, self.size, self.repeats = num_items, size, repeats
        self.seed, self.get_epoch = seed, get_epoch

    def __len__(self) -> int:
        return self.num_items // self.size * self.size * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.num_items, generator=seed_generator("epoch", self.seed, self.get_epoch()))
        chunks = order[: self.num_items // self.size * self.size].view(-1, self.size)
        yield from chunks.repeat_interleave(self.repeats, 0).flatten().tolist()
