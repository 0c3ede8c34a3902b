"""Rollouts of groups: what is drawn, what it is worth, what is trained, and that all of it can be made again."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.rollouts.policies import (
    STOPS,
    RewardFn,
    make_prompts,
    make_rollout,
    make_sampler,
    prompt_batches,
    prompt_packs,
    rate_letters,
)
from tests.train.small import assert_same_bits, settings
from transformers import LlamaForCausalLM

from potstill.core.errors import RewardFailed, TrainingStalled, UsageError
from potstill.core.types import ADVANTAGES, IGNORE, Batch, gold_mask
from potstill.data.packing import Packs
from potstill.decode.generate import generate
from potstill.decode.sampling import SamplingFilters
from potstill.objectives.grpo import GRPO
from potstill.objectives.policy_options import PolicyOptions
from potstill.ops.advantage import compute_group_advantages
from potstill.train import trainer
from potstill.train.rewards.base import Completion
from potstill.train.rollouts.base import seed_generator, split_documents
from potstill.train.rollouts.grouped import GroupedRollout
from potstill.train.rollouts.repeat_sampler import RepeatSampler
from potstill.train.run import read_run_metrics, train
from potstill.train.training_module import TrainingModule


def texts(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(document.input_ids.tolist()) for document in split_documents(batch)]


def rate_equally(completions: Sequence[Completion]) -> list[float]:
    return [0.5] * len(completions)


def rate_row(completions: Sequence[Completion]) -> list[float]:
    """All samples of an odd row are alike."""
    return [0.0 if int(one.row["answer"]) % 2 else rate_letters([one])[0] for one in completions]


def test_a_prompt_is_followed_by_its_samples_with_their_advantages(tiny_llama: LlamaForCausalLM) -> None:
    rollout = make_rollout()
    (batch,) = rollout.roll_out(prompt_batches([3, 0, 5]), tiny_llama, step=4)
    groups = rollout.sampler.draw([3, 0, 5], tiny_llama, step=4)
    prompts, documents = make_prompts(), split_documents(batch)
    for place, group in enumerate(groups):
        prompt = list(prompts[group.number].input_ids)
        members = [one for one in documents if int(one.fields["groups"]) == place]
        shared = [one for one in members if (one.labels == IGNORE).all()]
        samples = [one for one in members if (one.labels != IGNORE).any()]
        assert [one.input_ids.tolist() for one in shared] == ([prompt[:-1]] if len(prompt) > 1 else [])
        advantages = compute_group_advantages(group.rewards, torch.zeros(4, dtype=torch.long))
        for sample, document, advantage in zip(group.samples, samples, advantages, strict=True):
            assert document.input_ids.tolist() == [*prompt, *sample.tokens]
            assert document.labels.tolist() == [*[IGNORE] * len(prompt), *sample.tokens]
            assert document.prefix_length == len(prompt) - 1
            assert int(document.fields["rows"]) == group.number
            assert float(document.fields["advantages"]) == pytest.approx(float(advantage), rel=1e-6)
            assert document.fields["sampling_log_p"].tolist() == pytest.approx([*[0.0] * len(prompt), *sample.log_p])
    assert not gold_mask(batch).any()


def test_the_samples_are_those_that_each_noise_gives_alone(tiny_llama: LlamaForCausalLM) -> None:
    sampler, numbers = make_sampler(seed=3), [2, 7]
    groups = sampler.draw(numbers, tiny_llama, step=1)
    for number, group in zip(numbers, groups, strict=True):
        noise = torch.rand(4, 6, generator=seed_generator("group", 3, 1, number, 0))
        prompt = torch.tensor(sampler.prompts[number].input_ids)
        for row, sample in zip(noise, group.samples, strict=True):
            alone = generate([(1.0, tiny_llama)], [prompt], row[None], [6], sampler.sampling)
            assert alone == [sample.tokens]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_how_a_step_is_cut_into_passes_changes_no_sample_and_no_advantage(
    scale: str, tiny_llama: LlamaForCausalLM
) -> None:
    rollout = make_rollout(scale_rewards=scale)
    (whole,) = rollout.roll_out(prompt_batches([0, 1, 2, 3]), tiny_llama, step=0)
    parts = rollout.roll_out(prompt_batches([0], [1, 2], [3]), tiny_llama, step=0)
    assert [text for part in parts for text in texts(part)] == texts(whole)
    torch.testing.assert_close(torch.cat([part[ADVANTAGES] for part in parts]), whole[ADVANTAGES])


def test_each_step_and_seed_draws_something_else(tiny_llama: LlamaForCausalLM) -> None:
    drawn = {
        (seed, step): str(texts(make_rollout(seed=seed).roll_out(prompt_batches([0]), tiny_llama, step=step)[0]))
        for seed, step in ((0, 0), (0, 1), (1, 0))
    }
    assert len(set(drawn.values())) == 3


def test_flat_groups_are_replaced_by_those_of_other_prompts(tiny_llama: LlamaForCausalLM) -> None:
    rollout = make_rollout(rate_row, refills=8)
    (batch,) = rollout.roll_out(prompt_batches([1, 2, 3]), tiny_llama, step=0)
    rows = {int(one.fields["rows"]) for one in split_documents(batch) if "advantages" in one.fields}
    assert 2 in rows
    assert all(row % 2 == 0 for row in rows if row >= 0)
    metrics = rollout.summarize(rollout.pop_totals())
    assert metrics["flat_groups"] == pytest.approx(2 / 3)
    assert metrics["refilled_groups"] == 2


def test_a_refill_draws_no_prompt_twice(tiny_llama: LlamaForCausalLM) -> None:
    calls: list[int] = []

    def rate(completions: Sequence[Completion]) -> list[float]:
        """Equal rewards at the first call, and different ones after it."""
        calls.append(len(completions))
        return rate_equally(completions) if len(calls) == 1 else [float(n) for n in range(len(completions))]

    (batch,) = make_rollout(rate, refills=1).roll_out(prompt_batches(list(range(12))), tiny_llama, step=0)
    assert calls == [48, 48]
    rows = [int(one.fields["rows"]) for one in split_documents(batch) if (one.labels != IGNORE).any()]
    assert sorted(rows) == sorted([*range(12)] * 4)


def test_refills_end_and_leave_what_is_flat(tiny_llama: LlamaForCausalLM) -> None:
    rollout = make_rollout(rate_equally, refills=3)
    (batch,) = rollout.roll_out(prompt_batches([1, 2]), tiny_llama, step=0)
    assert not batch[ADVANTAGES].any()
    assert rollout.totals["refilled"] == 0  # of six that were drawn
    assert rollout.totals["documents"] == 8  # the rewards of refilled prompts are in no mean


def test_cut_samples_are_kept_dropped_or_penalized(tiny_llama: LlamaForCausalLM) -> None:
    counts, stop = {}, range(100)
    for overlong in ("keep", "drop"):
        rollout = make_rollout(overlong=overlong, samples=8, max_tokens=3, stop=stop)
        (batch,) = rollout.roll_out(prompt_batches([0, 1, 2]), tiny_llama, step=0)
        lasts = Counter(int(one.labels[-1]) in stop for one in split_documents(batch) if (one.labels != IGNORE).any())
        counts[overlong] = (lasts[True], lasts[False])
    ended, cut = counts["keep"]
    assert ended > 0
    assert cut > 0
    assert counts["drop"] == (ended, 0)

    options = {"overlong": "penalize", "overlong_buffer": 0.5, "samples": 8, "max_tokens": 4, "stop": stop}
    for group in make_sampler(rate_equally, **options).draw([0, 1, 2], tiny_llama, step=0):
        lengths = [len(sample.tokens) for sample in group.samples]
        penalties = {1: 0.0, 2: 0.0, 3: -0.5, 4: -1.0}  # the buffer is the last two of four tokens
        assert group.rewards.tolist() == [0.5 + penalties[length] for length in lengths]


def test_a_pass_whose_samples_are_all_dropped_holds_its_prompt(tiny_llama: LlamaForCausalLM) -> None:
    rollout = make_rollout(overlong="drop", max_tokens=2, stop=())
    (batch,) = rollout.roll_out(prompt_batches([0]), tiny_llama, step=0)
    module = TrainingModule(tiny_llama, GRPO(policy=PolicyOptions(overlong="drop")))
    assert (batch["labels"] == IGNORE).all()
    assert module.counts(batch).tolist() == [0, 0]
    assert float(module(**batch)["loss"].detach()) == 0


def test_ten_steps_of_flat_groups_or_of_cut_samples_end_the_run(tiny_llama: LlamaForCausalLM) -> None:
    """Trap: every answer cut, or every reward equal, trains on nothing without an error."""
    for rollout, message in (
        (make_rollout(rate_equally), "for 10 steps the samples of every prompt had equal rewards.*another --reward"),
        (make_rollout(max_tokens=1, stop=()), "for 10 steps every sample was cut at 1 tokens.*raise --max-tokens"),
    ):
        for step in range(9):
            rollout.roll_out(prompt_batches([0]), tiny_llama, step=step)
        restored = make_rollout(rate_equally)
        restored.load_state_dict(rollout.state_dict())
        assert (restored.num_flat_steps, restored.num_cut_steps) == (rollout.num_flat_steps, rollout.num_cut_steps)
        with pytest.raises(TrainingStalled, match=message):
            rollout.roll_out(prompt_batches([0]), tiny_llama, step=9)


def test_one_step_that_teaches_begins_the_count_again(tiny_llama: LlamaForCausalLM) -> None:
    rollout = make_rollout(rate_row)
    for step in range(25):
        rollout.roll_out(prompt_batches([1] if step % 9 else [1, 2]), tiny_llama, step=step)
    assert rollout.num_flat_steps == 6  # since step 18


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions: [1.0 / 0 for _ in completions], "letters raises ZeroDivisionError"),
        (lambda completions: [float("nan")] * len(completions), "letters returns nan"),
        (lambda completions: [1.0], "letters returns 1 values for 8 completions"),
    ],
)
def test_a_reward_that_fails_ends_the_run_in_one_sentence(
    reward: RewardFn, message: str, tiny_llama: LlamaForCausalLM
) -> None:
    with pytest.raises(RewardFailed, match=message):
        make_rollout(reward).roll_out(prompt_batches([0, 1]), tiny_llama, step=0)


def test_one_sample_no_token_and_filters_are_refused() -> None:
    with pytest.raises(UsageError, match="--samples is 1; an advantage compares samples"):
        make_sampler(samples=1)
    with pytest.raises(UsageError, match="--max-tokens is 0"):
        make_sampler(max_tokens=0)
    sampler = make_sampler()
    with pytest.raises(UsageError, match="omit top-p"):  # trap: top-p beside ratios
        replace(sampler, sampling=replace(sampler.sampling, filters=SamplingFilters(top_p=0.9)))


def test_a_reward_reads_the_text_the_row_and_whether_the_answer_ended(tiny_llama: LlamaForCausalLM) -> None:
    seen: list[Completion] = []

    def remember(completions: Sequence[Completion]) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    sampler = make_sampler(remember, samples=8)
    groups = sampler.draw([4], tiny_llama, step=0)
    for completion, sample in zip(seen, groups[0].samples, strict=True):
        assert (completion.prompt, completion.row["answer"]) == ("prompt 4", "4")
        assert completion.ended == (sample.tokens[-1] in STOPS)
        kept = sample.tokens[:-1] if completion.ended else sample.tokens
        assert completion.completion == sampler.tokenizer.decode([token for token in kept if token > 2])
    assert {completion.ended for completion in seen} == {True, False}


def test_chunks_are_repeated_and_each_epoch_has_another_order() -> None:
    epoch = 0
    sampler = RepeatSampler(11, size=4, repeats=3, seed=1, get_epoch=lambda: epoch)
    first = list(sampler)
    assert len(sampler) == len(first) == 24
    assert first[:4] == first[4:8] == first[8:12]
    assert first[12:16] == first[16:20] == first[20:]
    assert len({*first[:4], *first[12:16]}) == 8
    epoch = 1
    assert list(sampler) != first


def make_module(model: LlamaForCausalLM, policy: PolicyOptions) -> TrainingModule:
    student = type(model)(model.config).to(model.dtype)
    student.load_state_dict(model.state_dict())
    return TrainingModule(student, GRPO(policy=policy))


def run(
    model: LlamaForCausalLM,
    folder: Path,
    *,
    reward: RewardFn = rate_letters,
    steps: int = 6,
    micro: int = 64,
    packs: Packs | None = None,
    resume: bool = False,
    eval_every: int = 0,
    learning_rate: float = 1e-3,
    **options: Any,
) -> tuple[TrainingModule, GroupedRollout]:
    """A run of steps of four prompts, in one pass or two; a checkpoint after every third."""
    rollout = make_rollout(reward, **options)
    if eval_every:
        rollout.validation = make_sampler(reward, count=3, samples=8)
    module = make_module(model, rollout.sampler.policy)
    config = settings(
        tokens=steps * 64, context=16, micro_tokens=micro, learning_rate=learning_rate, eval_every=eval_every
    )
    packs = packs or prompt_packs()
    train(module, packs, config, folder, validation=packs, rollout=rollout, resume=resume, show=False)
    return module, rollout


def test_the_value_of_a_policy_gradient_is_no_sign_of_divergence(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `rloo` it grows with the lengths of samples."""
    monkeypatch.setattr(trainer, "find_loss_explosion", lambda log: 1.0)
    rloo = {"normalization": "constant", "length": 1, "scale_rewards": "none", "leave_one_out": True}
    run(tiny_llama, tmp_path / "rloo", steps=2, **rloo)
    assert len([line for line in read_run_metrics(tmp_path / "rloo") if "loss" in line]) == 2


def test_a_policy_learns_what_is_rewarded_and_the_metrics_say_so(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path, steps=20, eval_every=10, learning_rate=1e-2, samples=8)
    lines = read_run_metrics(tmp_path)
    steps, evaluations = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    first, last = (sum(step["reward"] for step in some) / 4 for some in (steps[:4], steps[-4:]))
    assert last > first + 0.2
    assert evaluations[-1]["eval_reward"] > 0.2
    assert evaluations[-1]["eval_loss"] == -evaluations[-1]["eval_reward"]
    for line in steps:
        assert line["reward"] == line["reward_letters"]
        assert 0 <= line["flat_groups"] <= 1
        assert 0 <= line["cut_samples"] <= 1
        assert 1 <= line["sample_tokens"] <= 6
        assert line["sampling_gap"] < 1e-4  # trap: decoding computes other probabilities than training


def test_accumulation_changes_nothing_of_a_run(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    modules = [
        run(tiny_llama.double(), tmp_path / str(micro), steps=2, micro=micro, scale_rewards="batch")[0]
        for micro in (64, 16)
    ]
    weights = dict(modules[1].student.named_parameters())
    for name, weight in modules[0].student.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_that_is_resumed_in_an_epoch_or_between_two_updates_ends_alike(
    updates: int, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"updates": updates, "steps": 6, "packs": prompt_packs(9)}  # an epoch: 2 or 4 steps
    straight, _ = run(tiny_llama, tmp_path, **options)
    drawn = [line.get("reward") for line in read_run_metrics(tmp_path) if "loss" in line]
    assert [reward is None for reward in drawn] == [step % updates > 0 for step in range(6)]
    (tmp_path / "checkpoint-6").rename(tmp_path / "gone")
    again, _ = run(tiny_llama, tmp_path, resume=True, **options)  # from the third step
    assert_same_bits(straight, again)
