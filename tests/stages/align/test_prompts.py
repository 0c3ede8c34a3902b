"""Policy gradients from end to end: prompts and a reward in, a model that earns more of it out."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.world import interrupted, written
from tests.teachers.test_served_judge import serve_chat

from potstill.core.errors import DataError, Interrupted, RewardFailed, UsageError
from potstill.stages.align import plan as align_plan
from potstill.stages.align.checks import check_decoding
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.options import AlignTrainConfig
from potstill.stages.align.prepare import prepare
from potstill.stages.align.preview import preview_align
from potstill.stages.align.prompts import limit_prompts_per_step
from potstill.stages.align.run import align
from potstill.stages.checks.report import FAIL, PASS
from potstill.stages.resources.calibration import StepMeasurements
from potstill.stages.resources.profiling import profile_steps
from potstill.train.rewards.base import Completion
from potstill.train.rollouts.groups import GroupSampler

REWARD = """
def letters(completions):
    return [sum(x.isascii() and x.isalpha() for x in c.completion) / max(1, len(c.completion)) for c in completions]

def equal(completions):
    return [1.0 for _ in completions]

def fails(completions):
    raise KeyError("nothing")
"""
SETTINGS = AlignTrainConfig(
    tokens=6 * 256, context=64, batch_tokens=256, micro_tokens=128, save_every=3, learning_rate=1e-2
)


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    (file := tmp_path / "rewards.py").write_text(REWARD)
    return file


@pytest.fixture
def policy_config(teacher: Path, rewards: Path, tmp_path: Path) -> AlignConfig:
    """A few steps of GRPO over four prompts each, with a reward of a user's file."""
    rows = [{"prompt": f"{n}+1?", "answer": str(n + 1)} for n in range(40)]
    held_out = [{"prompt": f"{n}+2?", "answer": str(n + 2)} for n in range(6)]
    return AlignConfig(
        model=str(teacher),
        objective="grpo",
        data=str(written(tmp_path / "prompts.jsonl", rows)),
        eval_data=str(written(tmp_path / "held_out.jsonl", held_out)),
        reward=f"{rewards}:letters",
        samples=4,
        max_tokens=5,
        settings=SETTINGS,
        dtype="float32",
        save_dtype="float32",
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_model_earns_more_of_the_reward_and_its_card_says_how_much(
    policy_config: AlignConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, eval_every=3)
    run = align(replace(policy_config, settings=settings), tmp_path / "made", show=False)
    assert "tokens in place of" not in capsys.readouterr().err, "samples have any length"
    before, after = run.before_training, run.measures["made"]
    assert after.sampled_reward.value > before.sampled_reward.value
    assert before.sampled_reward.n == 6
    assert before.sampled_reward.low is not None
    assert 0 <= after.cut_samples.value <= 1
    assert 1 <= after.sample_tokens.value <= 5
    checks = {check["name"]: check["outcome"] for check in run.card.invariants}
    assert list(checks)[:3] == ["LM head reproduced", "packing isolation", "decoding agrees with training"]
    assert all(outcome.startswith("pass") for outcome in list(checks.values())[:3])
    assert run.card.data["kind"] == "prompts"
    assert run.card.data["prompts"] == 37  # the others are held out by hash
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "grpo", "reward", "reward_letters", "flat_groups", "cut_samples", "sampling_gap"} <= set(lines[0])
    assert [line["eval_reward"] for line in lines if "eval_reward" in line][-1] > 0


def test_the_accuracy_of_samples_is_measured_where_it_has_no_gate_and_no_weight(
    policy_config: AlignConfig, tmp_path: Path
) -> None:
    rows: list[Any] = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1), "language": "en"} for n in range(40)]
    config = replace(policy_config, data=str(written(tmp_path / "sums.jsonl", rows)), eval_data=None)
    names = {}
    for reward in ("accuracy", "slc_rl", "m_thinker:minimum=2"):
        names[reward] = {measure.name for measure in prepare(replace(config, reward=reward)).measure_baseline()}
    assert "sampled_accuracy" in names["accuracy"] & names["slc_rl"]
    assert "sampled_accuracy" not in names["m_thinker:minimum=2"]


def test_a_decoder_of_another_distribution_is_found_out(policy_config: AlignConfig) -> None:
    run = prepare(policy_config)
    inputs = run.make_check_inputs()
    assert check_decoding(inputs).outcome == PASS
    assert check_decoding(replace(inputs, temperature=1.1)).outcome == FAIL


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_weights(policy_config: AlignConfig, tmp_path: Path) -> None:
    config = replace(policy_config, objective="grpo:variant=dapo,updates=2,kl=0.1")
    align(config, tmp_path / "made", show=False)
    again = tmp_path / "again"
    with interrupted(again), pytest.raises(Interrupted, match="--resume"):
        align(config, again, show=False)
    align(config, again, resume=True, show=False)
    left, right = weights(tmp_path / "made"), weights(again)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("objective", ["grpo", "grpo:normalization=tokens,scale_rewards=batch"])
def test_eight_passes_of_a_step_are_one(
    objective: str, policy_config: AlignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: every step has exactly its prompts, over the end of an epoch too."""
    drawn: list[int] = []
    draw = GroupSampler.draw

    def record(sampler: GroupSampler, numbers: Sequence[int], *arguments: Any, **options: Any) -> Any:
        drawn.extend([len(numbers)] if options["step"] >= 0 else [])
        return draw(sampler, numbers, *arguments, **options)

    monkeypatch.setattr(GroupSampler, "draw", record)
    lines = {}
    for micro in (64, 512):
        settings = AlignTrainConfig(epochs=1.2, context=64, prompts_per_step=8, micro_tokens=micro, learning_rate=1e-3)
        assert settings.accumulation_steps() == 512 // micro
        run = align(replace(policy_config, objective=objective, settings=settings), tmp_path / str(micro), show=False)
        lines[micro] = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert drawn == [8] * 10  # twice four steps of 37 prompts, and one of the next epoch
    for one, many in zip(lines[512], lines[64], strict=True):
        for name in ("loss", "grad_norm", "reward", "sample_tokens", "sampling_gap"):
            assert one[name] == pytest.approx(many[name], rel=1e-4, abs=1e-6), name


def test_a_preview_counts_steps_and_samples_in_memory(policy_config: AlignConfig, tmp_path: Path) -> None:
    report = preview_align(policy_config, tmp_path / "out")
    assert report["training"]["steps"] == 6
    assert report["training"]["passes"] == pytest.approx(6 * 4 / 36)  # the last of 37 prompts is in no whole step
    assert report["data"]["measured_on"] == "4 answers to each of 6 prompts"
    assert report["training"]["prompts_per_step"] == 4
    settings = AlignTrainConfig(epochs=2.0, context=64, prompts_per_step=20, micro_tokens=64)
    larger = preview_align(replace(policy_config, settings=settings), tmp_path / "out")
    assert (larger["training"]["steps"], larger["training"]["prompts_per_step"]) == (2, 20)
    assert larger["training"] == {"tokens": 2 * 20 * 64, "steps": 2, "passes": 2.0, "prompts_per_step": 20}
    assert larger["memory"]["peak"] < report["memory"]["peak"], "a pass holds one group, and was two"


def test_a_step_of_a_recipe_takes_no_more_prompts_than_there_are(
    policy_config: AlignConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for num_prompts, limit in ((37, 37), (50, 37)):
        settings = replace(SETTINGS, prompts_per_step=num_prompts)
        limited = limit_prompts_per_step(replace(policy_config, settings=settings))
        assert limited.settings.packs_per_step == limit
    assert capsys.readouterr().err.count("each step takes all 37 prompts, since there are fewer than 50") == 1
    assert limit_prompts_per_step(policy_config) is policy_config


def test_a_plan_draws_few_samples_and_scales_the_time_of_a_step(
    policy_config: AlignConfig, rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One draw serves 16 updates, and its samples have equal rewards: a run would end with an error, a plan goes on."""
    drawn: list[tuple[int, float]] = []
    measured: list[StepMeasurements] = []
    draw, measure = GroupSampler.draw, profile_steps

    def record(sampler: GroupSampler, numbers: Sequence[int], *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        groups = draw(sampler, numbers, *arguments, **options)
        drawn.append((len(numbers), time.perf_counter() - start))
        return groups

    def record_steps(*arguments: Any, **options: Any) -> StepMeasurements:
        measured.append(measure(*arguments, **options))
        return measured[0]

    monkeypatch.setattr(GroupSampler, "draw", record)
    monkeypatch.setattr(align_plan, "profile_steps", record_steps)
    settings = AlignTrainConfig(epochs=1.0, context=64, prompts_per_step=32, micro_tokens=128)
    config = replace(policy_config, objective="grpo:updates=16", reward=f"{rewards}:equal", settings=settings)
    report = align_plan.plan_align(config, tmp_path / "out")
    assert [count for count, _ in drawn] == [4]  # two passes of two prompts each
    parts, seconds = report["time"]["parts"], measured[0].seconds
    assert parts["sampling"] >= 8 * drawn[0][1] / 16
    assert parts == {name: part * (1 if name == "optimizer" else 8) for name, part in seconds.items()}
    assert report["time"]["seconds"] == pytest.approx(16 * sum(parts.values()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reward": None}, UsageError, "grpo needs a reward; give --reward, such as accuracy"),
        ({"reference_cache": "c", "objective": "grpo:kl=1"}, UsageError, "trains on what the model writes"),
        ({"reference": "smollm2"}, UsageError, "grpo compares with no reference model"),
        ({"objective": "grpo:variant=ppo"}, UsageError, "grpo has no variant 'ppo'"),
        ({"objective": "grpo:temperature=0"}, UsageError, "greedy samples would all be the same"),
        ({"reward": "accurracy"}, UsageError, "there is no reward 'accurracy'.*accuracy"),
        ({"reward": "language"}, DataError, "has no 'language', which the reward reads"),
        ({"settings": replace(SETTINGS, prompts_per_step=50)}, UsageError, "there are 37 .* lower --prompts-per-step"),
        ({"settings": replace(SETTINGS, batch_tokens=50 * 64)}, UsageError, "50 prompts, .* lower --batch-tokens, or"),
        ({"max_tokens": 20}, DataError, "4 answers of 20 tokens to a prompt of .* a pass holds groups of 64"),
    ],
)
def test_bad_input_is_refused_before_training(
    options: dict[str, Any], error: type[Exception], message: str, policy_config: AlignConfig
) -> None:
    with pytest.raises(error, match=message):
        prepare(replace(policy_config, **options))


def test_a_served_judge_scores_the_answers(policy_config: AlignConfig) -> None:
    with serve_chat({"choices": [{"message": {"content": "<score>0.25</score>"}}]}) as (url, bodies):
        reward = prepare(replace(policy_config, reward=f"thinking:judge={url}#m")).prepared.reward
        assert reward([Completion("3+4?", "7</think>7", {"solution": "3 + 4 = 7"}, ended=True)]) == [0.25]
    assert [body["model"] for body in bodies] == ["m"]


def test_a_reward_that_fails_ends_the_run_before_the_first_step(
    policy_config: AlignConfig, rewards: Path, tmp_path: Path
) -> None:
    with pytest.raises(RewardFailed, match="fails raises KeyError"):
        align(replace(policy_config, reward=f"{rewards}:fails"), tmp_path / "made", show=False)


def test_prompts_that_do_not_fit_are_left_out_and_counted(
    policy_config: AlignConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a" * (40 if n < 2 else 3), "answer": str(n)} for n in range(9)]
    data = written(tmp_path / "more.jsonl", [{**row, "prompt": f"{row['prompt']}{n}"} for n, row in enumerate(rows)])
    run = prepare(replace(policy_config, data=str(data)))
    assert max(run.packs.lengths) < 40
    assert "left out 2 with a prompt whose answers do not fit into --context 64" in capsys.readouterr().err
