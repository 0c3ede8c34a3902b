"""Groups of samples: several completions of each prompt, with their rewards, as documents that share the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UsageError
from potstill.core.types import ADVANTAGES, IGNORE, ROWS, SAMPLING_LOG_P
from potstill.data.prompt_rows import Prompt
from potstill.data.shared_prompts import build_group
from potstill.data.token_dataset import TokenizedDocument
from potstill.decode.generate import Sample, generate_samples
from potstill.decode.sampling import Sampling, SamplingFilters
from potstill.objectives.policy_options import DROP, PENALIZE, PolicyOptions
from potstill.train.rewards.base import Completion
from potstill.train.rewards.weighted import RewardSum
from potstill.train.rollouts.base import count_completions, seed_generator

REWARD = "reward"  # the metric, and the beginning of those of its terms


class Group(NamedTuple):
    """The samples of the prompt with this number.

    `scores` are the reward of each sample and its terms, by the names of their metrics. `rewards` are what the samples
    are compared by: penalties are included.
    """

    number: int
    samples: Sequence[Sample]
    rewards: Float[Tensor, " G"]
    scores: Mapping[str, Float[Tensor, " G"]]

    @property
    def is_flat(self) -> bool:
        """Whether all rewards are equal, so that no sample has an advantage."""
        return bool(self.rewards.max() == self.rewards.min())


@dataclass(frozen=True, kw_only=True)
class GroupSampler:
    """Draws `samples` completions of at most `max_tokens` tokens for each prompt, and scores them.

    The noise of a sample follows from `seed`, the step, the number of the prompt and the sample alone. So neither the
    passes of a step nor the ranks change what is drawn.

    Raises: UsageError for one sample, which has nothing to be compared with, or for a sampling with filters such as
        top-p. Ratios and log-probabilities are those of the whole distribution, and such samples are not drawn from it.
    """

    prompts: Sequence[Prompt]
    reward: RewardSum
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    policy: PolicyOptions
    samples: int = 8
    max_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UsageError(
                f"--samples is {self.samples}; an advantage compares samples of a prompt, so draw 2 or more"
            )
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens is {self.max_tokens}; a sample has at least one token")
        if self.sampling.filters != SamplingFilters():
            raise UsageError(
                "the samples of a policy gradient are drawn from its whole distribution; omit top-p, top-k, min-p and "
                "the repetition penalty"
            )
        object.__setattr__(self, "sampling", replace(self.sampling, temperature=self.policy.temperature))

    def draw(self, numbers: Sequence[int], student: nn.Module, *, step: int, attempt: int = 0) -> list[Group]:
        """A group for each of the prompts with these numbers.

        Raises: RewardFailed for a reward that raises, hangs, or gives no finite number for each sample.
        """
        if not numbers:
            return []
        device, shape = next(student.parameters()).device, (self.samples, self.max_tokens)
        prompts = [torch.tensor(self.prompts[number].input_ids, device=device) for number in numbers]
        generators = [seed_generator("group", self.seed, step, number, attempt) for number in numbers]
        noise = torch.stack([torch.rand(*shape, generator=generator) for generator in generators])
        groups = generate_samples(student, prompts, noise, self.max_tokens, self.sampling)
        return self._score(numbers, groups)

    def _score(self, numbers: Sequence[int], groups: Sequence[Sequence[Sample]]) -> list[Group]:
        """The groups with their rewards, all of which are computed in one call."""
        pairs = [(number, sample) for number, samples in zip(numbers, groups, strict=True) for sample in samples]
        result = self.reward.score_terms([self._make_completion(number, sample) for number, sample in pairs])
        terms = {REWARD: result.totals, **{f"{REWARD}_{name}": values for name, values in result.terms.items()}}
        columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in terms.items()}
        lengths = torch.tensor([len(sample.tokens) for _, sample in pairs])
        rewards = columns[REWARD] + self._compute_penalties(lengths)
        parts = {name: column.split(self.samples) for name, column in columns.items()}
        return [
            Group(number, samples, part, {name: column[place] for name, column in parts.items()})
            for place, (number, samples, part) in enumerate(
                zip(numbers, groups, rewards.split(self.samples), strict=True)
            )
        ]

    def sum_groups(self, groups: Sequence[Group]) -> dict[str, float]:
        """Sums over samples and groups by name: what `rollouts.base.count_completions` counts, rewards, flat groups."""
        counts = count_completions([sample.tokens for group in groups for sample in group.samples], self.sampling.stop)
        names = groups[0].scores if groups else ()
        scores = {name: float(sum(group.scores[name].sum() for group in groups)) for name in names}
        flat = sum(group.is_flat for group in groups)
        return {
            **{name: float(count) for name, count in counts.items()},
            **scores,
            "groups": float(len(groups)),
            "flat": float(flat),
        }

    def is_cut(self, sample: Sample) -> bool:
        """Whether a sample has no stop token."""
        return sample.tokens[-1] not in self.sampling.stop

    def make_documents(
        self, group: Group, advantages: Float[Tensor, " G"], *, number: int, shared: bool = True
    ) -> list[TokenizedDocument]:
        """The documents of a group, which has this number in its pass; of dropped samples there are none.

        Where all are dropped, the prompt alone is left.
        """
        prompt = list(self.prompts[group.number].input_ids)

        def make_document(sample: Sample, advantage: float) -> TokenizedDocument:
            log_p = [*[0.0] * len(prompt), *sample.log_p]
            fields = {ROWS: group.number, ADVANTAGES: advantage, SAMPLING_LOG_P: log_p}
            return TokenizedDocument([*prompt, *sample.tokens], [*[IGNORE] * len(prompt), *sample.tokens], fields)

        documents = [
            make_document(sample, advantage)
            for sample, advantage in zip(group.samples, advantages.tolist(), strict=True)
            if self.policy.overlong != DROP or not self.is_cut(sample)
        ]
        return build_group(documents or [make_document(Sample([], []), 0.0)], group=number, shared=shared)

    def _make_completion(self, number: int, sample: Sample) -> Completion:
        prompt, is_cut = self.prompts[number], self.is_cut(sample)
        text = self.tokenizer.decode(sample.tokens if is_cut else sample.tokens[:-1], skip_special_tokens=True)
        return Completion(prompt=prompt.text, completion=text, row=prompt.row, ended=not is_cut)

    def _compute_penalties(self, lengths: Tensor) -> Tensor:
        """DAPO's penalty (arXiv:2503.14476, equation 13): from 0 down to -1 in the last tokens that are allowed."""
        if self.policy.overlong != PENALIZE:
            return torch.zeros(len(lengths), dtype=torch.float64)
        buffer = max(1, round(self.policy.overlong_buffer * self.max_tokens))
        return ((self.max_tokens - buffer - lengths).double() / buffer).clamp(-1, 0)
