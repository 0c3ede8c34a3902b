"""Prompts, rewards and samplers small enough for whole runs of policy gradients in a test."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tests.tiny import byte_tokenizer

from potstill.core.types import Batch
from potstill.data.packing import Packs, collate
from potstill.data.prompt_rows import Prompt, pack_prompts
from potstill.decode.sampling import Sampling
from potstill.objectives.policy_options import PolicyOptions
from potstill.train.rewards.base import Completion
from potstill.train.rewards.weighted import RewardSum, RewardTerm
from potstill.train.rollouts.grouped import GroupedRollout
from potstill.train.rollouts.groups import GroupSampler

STOPS = (2, *range(200, 259))  # so many that some samples of a random model end
RewardFn = Callable[[Sequence[Completion]], Sequence[float]]


def make_prompts(count: int = 12) -> list[Prompt]:
    """Prompts of 1 to 6 random tokens, each with its number in its row."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 7, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(tokens, f"prompt {n}", {"answer": str(n)}) for n, tokens in enumerate(ids)]


def rate_letters(completions: Sequence[Completion]) -> list[float]:
    """The share of characters that are letters of ASCII."""
    return [
        sum(c.isascii() and c.isalpha() for c in one.completion) / max(1, len(one.completion)) for one in completions
    ]


def make_reward(function: RewardFn = rate_letters, name: str = "letters") -> RewardSum:
    return RewardSum((RewardTerm(name=name, reward=function),))


def make_sampler(
    reward: RewardFn = rate_letters, *, count: int = 12, stop: Iterable[int] = STOPS, **options: Any
) -> GroupSampler:
    names = ("samples", "max_tokens", "seed")
    chosen = {"samples": 4, "max_tokens": 6, **{name: options.pop(name) for name in names if name in options}}
    return GroupSampler(
        prompts=make_prompts(count),
        reward=make_reward(reward),
        tokenizer=byte_tokenizer(),
        sampling=Sampling(vocabulary=259, stop=frozenset(stop)),
        policy=PolicyOptions(**options),
        **chosen,
    )


def make_rollout(reward: RewardFn = rate_letters, *, shared: bool = True, **options: Any) -> GroupedRollout:
    """A rollout with these options of the sampler and of its policy."""
    return GroupedRollout(sampler=make_sampler(reward, **options), shared=shared)


def prompt_packs(count: int = 12) -> Packs:
    return pack_prompts(make_prompts(count))


def prompt_batches(*passes: Sequence[int]) -> list[Batch]:
    """A batch of prompts for each pass."""
    packs = prompt_packs()
    return [collate([packs[number] for number in numbers]) for numbers in passes]
