"""AlignDistil in the stage: two frozen policies, live or in caches, off-policy or on what the policy writes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.world import interrupted, saved
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import Interrupted, UsageError
from potstill.core.types import CHOSEN
from potstill.data.packing import collate
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.prepare import AlignRun, prepare
from potstill.stages.align.run import align
from potstill.stages.cache_teacher import CacheTeacherConfig


@pytest.fixture
def other(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Another model with the same tokenizer."""
    torch.manual_seed(3)
    return saved(tmp_path / "other", LlamaForCausalLM(tiny_llama.config), tiny_tokenizer)


@pytest.fixture
def extrapolation(config: AlignConfig, teacher: Path, other: Path) -> AlignConfig:
    """A policy that learns from itself and from another model."""
    return replace(config, objective="aligndistil", plus=str(teacher), minus=str(other))


def loss_of(run: AlignRun) -> float:
    return float(run.module.train()(**collate([run.packs[0]]))["loss"].detach())


def test_it_trains_on_chosen_answers_and_is_measured_on_pairs(extrapolation: AlignConfig) -> None:
    run = prepare(extrapolation)
    assert set(run.packs.fields["sides"].tolist()) == {CHOSEN}
    assert collate([run.validation[0]])["pairs"].shape[1] > 0
    assert loss_of(run) > 0
    baseline = {measure.name: measure.value for measure in run.measure_baseline()}
    assert baseline["preference_loss"] > 0
    assert baseline["reward_accuracy"] == 0.5
    assert [parent.role for parent in run.parents] == ["model before alignment", "plus", "minus"]
    assert all(check["outcome"].startswith("pass") for check in run.run_checks())


def test_a_policy_that_equals_both_models_has_nothing_to_learn(config: AlignConfig, teacher: Path) -> None:
    run = prepare(replace(config, objective="aligndistil", plus=str(teacher), minus=str(teacher)))
    assert loss_of(run) == pytest.approx(0.0, abs=1e-4)


def test_without_contrast_the_reference_takes_the_place_of_minus(extrapolation: AlignConfig) -> None:
    run = prepare(replace(extrapolation, objective="aligndistil:contrast=0", minus=None))
    assert set(run.module.frozen_networks) == {"plus", "reference"}
    assert loss_of(run) == pytest.approx(0.0, abs=1e-4), "the policy, plus and the reference are one model"
    with pytest.raises(UsageError, match="aligndistil compares with no minus model; omit --minus"):
        replace(extrapolation, objective="aligndistil:contrast=0")


def test_both_models_are_needed(extrapolation: AlignConfig) -> None:
    with pytest.raises(
        UsageError, match=r"learns from a model of chosen and one of rejected.*; give --plus and --minus"
    ):
        replace(extrapolation, plus=None, minus=None)


def test_caches_with_hidden_states_take_the_place_of_both_models(extrapolation: AlignConfig, tmp_path: Path) -> None:
    live = replace(extrapolation, eval_data=None)
    folders = {}
    for name in ("plus", "minus"):
        stage = CacheTeacherConfig(
            teacher=str(getattr(live, name)),
            data=live.data,
            context=live.settings.context,
            hidden=True,
            top_k=1,
            classes=1,
            dtype="float32",
        )
        stage.run(tmp_path / name, show=False)
        folders[name] = str(tmp_path / name)
    cached = replace(live, **folders)  # type: ignore[arg-type]
    runs = [prepare(live), prepare(cached)]
    assert runs[0].packs.digest == runs[1].packs.digest
    assert loss_of(runs[1]) == pytest.approx(loss_of(runs[0]), rel=0.05), "hidden states are stored in bfloat16"
    with pytest.raises(
        UsageError, match="a cache holds what a model gave for one text, and --on-policy writes another"
    ):
        prepare(replace(cached, on_policy=1.0))


def test_on_policy_the_model_answers_the_prompts_itself(extrapolation: AlignConfig, tmp_path: Path) -> None:
    settings = replace(extrapolation.settings, tokens=256)
    result = align(replace(extrapolation, on_policy=1.0, settings=settings), tmp_path / "made", show=False)
    line = (result.out / "metrics.jsonl").read_text().splitlines()[0]
    assert '"rollout_documents": 0' not in line
    assert "rollout_documents" in line


def test_a_stopped_run_on_its_own_answers_continues_to_the_same_weights(
    extrapolation: AlignConfig, tmp_path: Path
) -> None:
    config = replace(extrapolation, on_policy=0.5, settings=replace(extrapolation.settings, learning_rate=3e-3))
    align(config, tmp_path / "made", show=False)
    again = tmp_path / "again"
    with interrupted(again), pytest.raises(Interrupted, match="--resume"):
        align(config, again, show=False)
    align(config, again, resume=True, show=False)
    left, right = (load_file(folder / "model.safetensors") for folder in (tmp_path / "made", again))
    assert all(torch.equal(left[name], right[name]) for name in left)
