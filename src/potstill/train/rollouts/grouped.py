"""A rollout of groups: samples of each prompt of a step, their rewards, and their advantages over one another.

All passes of a step are drawn before the first of them is trained on. So the prompts are decoded together, advantages
may refer to the whole step, and every count is known beforehand. The trainer's batches hold prompts alone, with the
number of each in the field `rows`.

With several updates, the step that draws is followed by steps that train on the same samples, with the
log-probabilities of the policy that drew them. The trainer's sampler repeats the prompts of such steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from potstill.core.errors import TrainingStalled
from potstill.core.ranks import get_rank
from potstill.core.types import MAX_TOKENS, OLD_LOG_P, ROWS, Batch, Needs, move_batch, supervised_positions
from potstill.data.packing import collate, make_pack
from potstill.models.eval_mode import eval_mode
from potstill.models.signals import compute_signals
from potstill.objectives.row_terms import compute_target_log_probs
from potstill.ops.advantage import compute_group_advantages
from potstill.train import distributed
from potstill.train.rollouts.base import seed_generator
from potstill.train.rollouts.groups import REWARD, Group, GroupSampler

MAX_IDLE_STEPS = 10  # without a sample that teaches anything
EVALUATION_STEP = -1  # the step of the noise of evaluations


@dataclass(kw_only=True)
class GroupedRollout:
    """Group sampling for policy gradients: see `roll_out`. With `shared` the samples of a prompt share its tokens.

    Refills: while groups are flat, that is all of their rewards are equal, and at most `policy.refills` times, they are
    replaced by the groups of other prompts that are not flat. `validation` draws the samples of held-out prompts.

    Sources: see `objectives.policy_options.PolicyOptions`. Departs from DAPO: a step keeps the flat groups that are
    left after the last refill, and each rank refills its own.
    """

    sampler: GroupSampler
    validation: GroupSampler | None = None
    shared: bool = True
    max_idle_steps: int = MAX_IDLE_STEPS
    num_flat_steps: int = 0  # consecutive ones in which all groups were flat, or all samples cut
    num_cut_steps: int = 0
    update_batches: list[Batch] = field(default_factory=list)  # what the next updates train on
    totals: dict[str, float] = field(default_factory=dict)  # since they were last popped

    @property
    def updates(self) -> int:
        """Optimizer steps for each set of samples."""
        return self.sampler.policy.updates

    def roll_out(self, batches: Sequence[Batch], student: nn.Module, *, step: int) -> list[Batch]:
        """The passes of a step with samples after their prompts, and the advantage of each.

        Raises: RewardFailed, as `GroupSampler.draw` does; TrainingStalled if ten steps in a row taught nothing.
        """
        if step % self.updates:
            return self.update_batches
        numbers = [batch[ROWS].tolist() for batch in batches]
        groups = self.sampler.draw([number for part in numbers for number in part], student, step=step)
        self._add_totals(self.sampler.sum_groups(groups))  # without refills, which select groups
        groups = self._replace_flat_groups(groups, student, step)
        advantages = self._compute_advantages(groups)
        device, start, new_batches = batches[0]["input_ids"].device, 0, []
        for part in numbers:
            span = slice(start, start := start + len(part))
            new_batches.append(self._make_batch(groups[span], advantages[span], device))
        if self.updates > 1:
            self.update_batches = [self._add_old_log_p(batch, student) for batch in new_batches]
        return new_batches

    def _replace_flat_groups(self, groups: Sequence[Group], student: nn.Module, step: int) -> list[Group]:
        """The groups, with other prompts' in the place of flat ones."""
        groups, rank = list(groups), get_rank()
        for attempt in range(1, self.sampler.policy.refills + 1):
            places = [place for place, group in enumerate(groups) if group.is_flat]
            if not places:
                break
            generator = seed_generator("refill", self.sampler.seed, step, rank, attempt)
            numbers = torch.randperm(len(self.sampler.prompts), generator=generator)[: len(places)].tolist()
            attempt_of_rank = attempt * distributed.world_size() + rank  # so that no two ranks draw one group
            new_groups = self.sampler.draw(numbers, student, step=step, attempt=attempt_of_rank)
            self._add_totals({"refilled": float(sum(not group.is_flat for group in new_groups))})
            useful_groups = (group for group in new_groups if not group.is_flat)
            groups = [next(useful_groups, group) if group.is_flat else group for group in groups]
        return groups

    def _compute_advantages(self, groups: Sequence[Group]) -> Float[Tensor, "P G"]:
        """The advantage of each sample; all ranks together where their scale is that of the step.

        Raises: TrainingStalled.
        """
        policy, size = self.sampler.policy, self.sampler.samples
        rewards = torch.stack([group.rewards for group in groups])
        is_cut = all(self.sampler.is_cut(sample) for group in groups for sample in group.samples)
        rank_results = distributed.gather_from_ranks((rewards, is_cut))
        all_rewards = torch.cat([part for part, _ in rank_results])
        is_flat = bool((all_rewards.amax(1) == all_rewards.amin(1)).all())
        self._check_progress(is_flat=is_flat, is_cut=all(is_rank_cut for _, is_rank_cut in rank_results))
        advantages = compute_group_advantages(
            all_rewards.flatten(),
            torch.arange(len(all_rewards)).repeat_interleave(size),
            scale=policy.scale_rewards,
            leave_one_out=policy.leave_one_out,
        ).view_as(all_rewards)
        start = sum(len(part) for part, _ in rank_results[: get_rank()])
        return advantages[start : start + len(rewards)]

    def _check_progress(self, *, is_flat: bool, is_cut: bool) -> None:
        self.num_flat_steps = self.num_flat_steps + self.updates if is_flat else 0
        self.num_cut_steps = self.num_cut_steps + self.updates if is_cut else 0
        if self.num_cut_steps >= self.max_idle_steps:
            raise TrainingStalled(
                f"for {self.num_cut_steps} steps every sample was cut at {self.sampler.max_tokens} tokens before it "
                f"ended; raise --max-tokens, or begin with a model that ends its answers"
            )
        if self.num_flat_steps >= self.max_idle_steps:
            raise TrainingStalled(
                f"for {self.num_flat_steps} steps the samples of every prompt had equal rewards, so there was nothing "
                f"to learn; choose prompts that the model solves now and then, more --samples, or another --reward"
            )

    def _make_batch(self, groups: Sequence[Group], advantages: Float[Tensor, "P G"], device: torch.device) -> Batch:
        """One pass as a packed batch."""
        documents = [
            document
            for number, (group, row) in enumerate(zip(groups, advantages, strict=True))
            for document in self.sampler.make_documents(group, row, number=number, shared=self.shared)
        ]
        batch = collate([make_pack(documents)])
        limit = torch.tensor(self.sampler.max_tokens)
        batch |= {"sampled": torch.ones_like(batch["input_ids"], dtype=torch.bool), MAX_TOKENS: limit}
        return move_batch(batch, device)

    @torch.no_grad()
    def _add_old_log_p(self, batch: Batch, student: nn.Module) -> Batch:
        """The batch with the log-probability of each sampled token under the student as it is."""
        positions, targets, _ = supervised_positions(batch)
        sampling = self.sampler.sampling
        with eval_mode(student):
            signals = compute_signals(student, batch, Needs(positions), vocabulary=sampling.vocabulary)
            log_p = compute_target_log_probs(signals, targets, temperature=sampling.temperature)
        old_log_p = log_p.new_zeros(positions.shape)
        old_log_p[:, 1:][positions[:, :-1]] = log_p
        return {**batch, OLD_LOG_P: old_log_p}

    def _add_totals(self, sums: Mapping[str, float]) -> None:
        for name, value in sums.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def pop_totals(self) -> dict[str, float]:
        """Sums over samples and groups since the last call; none after a step that drew nothing."""
        totals, self.totals = self.totals, {}
        return totals

    def summarize(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The mean of each reward, the shares of flat groups and cut samples, and the mean number of tokens."""
        if not totals.get("documents"):
            return {}
        metrics = average_rewards(totals)
        metrics |= {"flat_groups": totals["flat"] / totals["groups"], "refilled_groups": totals.get("refilled", 0.0)}
        return metrics

    def evaluate(self, student: nn.Module) -> dict[str, float]:
        """The mean of each reward over samples of the held-out prompts, with the same noise at every call.

        Each rank draws for its share. `loss` is the mean reward times -1.
        """
        if self.validation is None:
            return {}
        numbers = range(get_rank(), len(self.validation.prompts), distributed.world_size())
        groups = self.validation.draw(numbers, student, step=EVALUATION_STEP)
        metrics = average_rewards(distributed.sum_over_ranks(self.validation.sum_groups(groups)))
        return {"loss": -metrics[REWARD], **metrics}

    def on_evaluate(self, loss: float) -> None:
        """An evaluation changes nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """The passes of the next updates, and the steps that taught nothing."""
        batches = {
            f"{number}|{name}": values.contiguous().clone()
            for number, batch in enumerate(self.update_batches)
            for name, values in batch.items()
        }
        return {"facts": torch.tensor([self.num_flat_steps, self.num_cut_steps]), **batches}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.num_flat_steps, self.num_cut_steps = state["facts"].tolist()
        batches: dict[int, dict[str, Tensor]] = {}
        for key, values in state.items():
            number, separator, name = key.partition("|")
            if separator:
                batches.setdefault(int(number), {})[name] = values
        self.update_batches = [batches[number] for number in sorted(batches)]


def average_rewards(totals: Mapping[str, float]) -> dict[str, float]:
    """The mean of each reward over samples, the share of samples that were cut, and their mean number of tokens."""
    count = totals["documents"]
    rewards = {name: total / count for name, total in totals.items() if name.startswith(REWARD)}
    return {**rewards, "cut_samples": totals["cut"] / count, "sample_tokens": totals["tokens"] / count}
