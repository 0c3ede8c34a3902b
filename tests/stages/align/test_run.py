"""Align from end to end: the folder, its card, and how a run is stopped and continued."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.world import interrupted, written

from potstill.core.errors import Interrupted
from potstill.data.packing import collate
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.prepare import prepare
from potstill.stages.align.run import align
from potstill.stages.training import TrainingResult

METRICS = {"margin", "accuracy", "chosen_log_p", "rejected_log_p", "chosen_tokens", "rejected_tokens", "kl"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def run(config: AlignConfig, tmp_path: Path) -> TrainingResult:
    settings = replace(config.settings, learning_rate=3e-3)
    return align(replace(config, settings=settings), tmp_path / "made", show=False)


def test_a_run_learns_the_preference_and_its_card_shows_both_sides_of_it(
    run: TrainingResult, config: AlignConfig, teacher: Path
) -> None:
    assert {file.name for file in run.out.iterdir()} >= {"model.safetensors", "card.json", "README.md", "metrics.jsonl"}
    before, after = run.before_training, run.measures["made"]
    assert before.preference_loss.value == pytest.approx(math.log(2), abs=1e-6)
    assert (before.reward_accuracy.value, before.reward_margin.value) == (0.5, 0.0)
    assert after.preference_loss.value < before.preference_loss.value
    assert after.reward_accuracy.value > 0.9
    assert after.reward_margin.low is not None
    assert after.reward_margin.low > 0
    assert after.reference_kl.value > 0
    assert before.shorter_accuracy.value == 1.0
    assert run.card.stage["objective"] == "dpo"
    assert [parent.role for parent in run.card.parents] == ["model before alignment"]
    checks = {check["name"]: check["outcome"] for check in run.card.invariants}
    names = ("LM head reproduced", "packing isolation", "stop token", "zero margin for a copy", "gradient accumulation")
    assert [*checks] == [*names, "logits after reload"]
    assert all(checks[name].startswith("pass") for name in names)
    assert "log 2" in checks["zero margin for a copy"]
    assert "| before training |" in (run.out / "README.md").read_text()
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert METRICS | {"loss", "dpo"} <= set(lines[0])
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["chosen_tokens"] < lines[0]["rejected_tokens"]


def test_a_stopped_run_continues_to_the_same_weights(run: TrainingResult, config: AlignConfig, tmp_path: Path) -> None:
    again = tmp_path / "again"
    settings = replace(config.settings, learning_rate=3e-3)
    with interrupted(again), pytest.raises(Interrupted, match="--resume"):
        align(replace(config, settings=settings), again, show=False)
    resumed = align(replace(config, settings=settings), again, resume=True, show=False)
    left, right = weights(run.out), weights(again)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert resumed.measures["before training"] == run.measures["before training"]


def test_a_policy_in_bfloat16_writes_samples_before_and_after(config: AlignConfig) -> None:
    run = prepare(replace(config, dtype="bfloat16"))
    samples = run.write_samples(run.origin)
    assert "before training" in samples
    assert run.origin.name in samples


@pytest.mark.parametrize("objective", ["ipo", "simpo", "orpo", "kto", "dpo:nll=0.2,smoothing=0.1,swap=1"])
def test_every_objective_of_preferences_gives_a_gradient_and_measures(objective: str, config: AlignConfig) -> None:
    run = prepare(replace(config, objective=objective))
    run.module.train()(**collate([run.packs[0]]))["loss"].backward()
    assert run.student.lm_head.weight.grad.abs().max() > 0
    baseline = {measure.name: measure.value for measure in run.measure_baseline()}
    assert math.isfinite(baseline["preference_loss"])
    assert baseline["reference_kl"] == pytest.approx(0.0, abs=1e-9)
    assert baseline.get("reward_accuracy") == (None if objective == "kto" else 0.5), "KTO reads single answers"
    assert all(check["outcome"].startswith("pass") for check in run.run_checks())


def test_kto_trains_on_single_answers_with_a_label(config: AlignConfig, tmp_path: Path) -> None:
    answers = ["Yes.", "Yes.", "No.", "No."]
    rows = [{"prompt": f"Is {i} odd?", "completion": answers[i % 4], "label": i % 2 == 0} for i in range(60)]
    data = written(tmp_path / "labels.jsonl", rows)
    run = prepare(replace(config, objective="kto", data=str(data), eval_data=None))
    run.module.train()(**collate([run.packs[0]]))["loss"].backward()
    assert run.student.lm_head.weight.grad.abs().max() > 0
    names = {measure.name for measure in run.measure_baseline()}
    assert names >= {"preference_loss", "reference_kl"}
    assert names.isdisjoint({"reward_accuracy", "likelihood_accuracy", "shorter_accuracy"})
