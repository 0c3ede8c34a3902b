"""Draws and scores the answers of a policy to prompts: for training, for its measures, and for checks before it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.counts import count_noun
from potstill.core.measure import Measure
from potstill.core.types import CHOSEN
from potstill.data.pack_fields import GROUPS, SIDES
from potstill.data.packing import Packs, pack
from potstill.data.prompt_rows import Prompt
from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import require_stop_tokens
from potstill.evaluate.bootstrap import measure_ratio
from potstill.models.eval_mode import eval_mode
from potstill.models.signals import unwrap_model
from potstill.models.tokenizers.vocabulary import count_usable_ids
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.validation import get_policy_options
from potstill.train.rewards.weighted import RewardSum
from potstill.train.rollouts.grouped import EVALUATION_STEP, GroupedRollout
from potstill.train.rollouts.groups import REWARD, GroupSampler
from potstill.train.training_module import TrainingModule

MEASURED_SAMPLES = 4  # of each held-out prompt
ACCURACY = "accuracy"  # the term of a reward that is a measure of its own


def make_sampler(
    config: AlignConfig,
    prompts: Sequence[Prompt],
    reward: RewardSum,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None = None,
) -> GroupSampler:
    """Draws and scores the answers of a policy, by default as many as in training.

    Raises: UsageError for a model in which no token ends an answer.
    """
    stop = require_stop_tokens(model, tokenizer)
    return GroupSampler(
        prompts=prompts,
        reward=reward,
        tokenizer=tokenizer,
        sampling=Sampling(vocabulary=count_usable_ids(tokenizer, model), stop=stop),
        policy=get_policy_options(config.loss),
        samples=config.samples if samples is None else samples,
        max_tokens=config.max_tokens,
        seed=config.settings.seed,
    )


@dataclass(frozen=True, kw_only=True)
class PromptEvaluator:
    """Measures a policy by the rewards of sampled answers to held-out prompts, with the same noise at every call."""

    config: AlignConfig
    prompts: Sequence[Prompt]
    reward: RewardSum
    tokenizer: PreTrainedTokenizerBase

    @property
    def subject(self) -> str:
        """What the policy is measured on."""
        return f"{MEASURED_SAMPLES} answers to each of {count_noun(len(self.prompts), 'prompt')}"

    @torch.no_grad()
    def measure(self, module: TrainingModule) -> list[Measure]:
        """`sampled_reward`, `sampled_accuracy` where `accuracy` is a term of it, `cut_samples` and `sample_tokens`."""
        model = unwrap_model(module.student)
        options = (self.config, self.prompts, self.reward, model, self.tokenizer)
        sampler = make_sampler(*options, samples=MEASURED_SAMPLES)
        device = next(module.student.parameters()).device
        with eval_mode(module.student), module.autocast(device):
            groups = sampler.draw(range(len(self.prompts)), module.student, step=EVALUATION_STEP)
        columns: dict[str, list[Any]] = {
            "sampled_reward": [group.scores[REWARD].mean() for group in groups],
            "cut_samples": [np.mean([sampler.is_cut(sample) for sample in group.samples]) for group in groups],
            "sample_tokens": [np.mean([len(sample.tokens) for sample in group.samples]) for group in groups],
        }
        names = (ACCURACY, f"{REWARD}_{ACCURACY}")
        accuracy = next((name for name in groups[0].scores if name.split(".")[-1] in names), None)
        if accuracy is not None:
            columns["sampled_accuracy"] = [group.scores[accuracy].mean() for group in groups]
        return [measure_ratio(name, np.array(values, dtype=float)) for name, values in columns.items()]


def sample_packs(rollout: GroupedRollout, module: TrainingModule, *, count: int) -> Packs:
    """A pack for each group of the first `count` prompts, for checks; every sample is on the side `CHOSEN`."""
    sampler = rollout.sampler
    device = next(module.student.parameters()).device
    numbers = range(min(count, len(sampler.prompts)))
    with torch.no_grad(), module.autocast(device):
        groups = sampler.draw(numbers, module.student, step=EVALUATION_STEP)
    documents = []
    for group in groups:
        zeros = torch.zeros_like(group.rewards)
        for document in sampler.make_documents(group, zeros, number=group.number, shared=rollout.shared):
            side: Mapping[str, int] = {SIDES.name: CHOSEN} if any(label >= 0 for label in document.labels) else {}
            documents.append(document._replace(fields={**document.fields, **side}))
    sizes = Counter[int]()
    for document in documents:
        sizes[document.fields[GROUPS.name]] += len(document.input_ids)
    return pack(documents, length=max(sizes.values()))
