"""Distilling on what the student writes: refused where nobody answers, resumable, and told in the card."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving import Server
from tests.stages.distill.test_run import SETTINGS, same
from tests.stages.world import interrupted, saved
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import Interrupted, UsageError, VocabularyMismatch
from potstill.core.metrics_log import read_metrics
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.rollouts import check_rollout_tokenizers
from potstill.stages.distill.run import distill
from potstill.train.rollouts.config import RolloutConfig


@pytest.fixture
def stage(teacher: Path, pairs: Path) -> DistillConfig:
    small: dict[str, Any] = {"settings": SETTINGS, "dtype": "float32", "documents": 2}
    return DistillConfig(teacher=str(teacher), keep=0.755, data=str(pairs), on_policy=0.5, **small)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"on_policy": 1.5}, "--on-policy is 1.5"),
        ({"rollout": "ppo"}, "there is no rollout 'ppo'; choose one of gkd, distillm, minillm"),
        ({"objective": ObjectiveConfig(name="cross_entropy")}, "omit --on-policy"),
        ({"teacher_cache": "a cache"}, "a teacher that is here or served"),
        ({"rollout": "distillm"}, "give --eval-every"),
        ({"rollout": "minillm", "on_policy": 0.0}, "such as --on-policy 0.5"),
        (
            {"rollout": "minillm", "teacher": "http://host/v1", "student": "s", "keep": None},
            "with the teacher, token by token",
        ),
    ],
)
def test_rollouts_that_nobody_could_answer_for_are_refused(
    change: dict[str, Any], said: str, stage: DistillConfig
) -> None:
    with pytest.raises(UsageError, match=said):
        replace(stage, **change)


def test_card_and_readme_say_who_wrote_and_metrics_how_much(stage: DistillConfig, tmp_path: Path) -> None:
    run = distill(stage, tmp_path / "made", show=False)
    card = json.loads((run.out / "card.json").read_text())
    assert (card["stage"]["on_policy"], card["stage"]["rollout"]) == (0.5, "gkd")
    assert "50% of the documents with its own completions" in " ".join((run.out / "README.md").read_text().split())
    lines = [line for line in read_metrics(run.out / "metrics.jsonl") if "loss" in line]
    assert sum(line["rollout_documents"] for line in lines) > 0


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_weights(stage: DistillConfig, tmp_path: Path) -> None:
    settings = replace(SETTINGS, eval_every=1)
    for name, one in (("gkd", stage), ("distillm", replace(stage, rollout="distillm", settings=settings))):
        distill(one, tmp_path / name, show=False)
        again = tmp_path / f"{name}-again"
        with interrupted(again), pytest.raises(Interrupted):
            distill(one, again, show=False)
        distill(one, again, resume=True, show=False)
        assert same(tmp_path / name, again)


@pytest.mark.slow
def test_another_share_is_another_run(stage: DistillConfig, tmp_path: Path) -> None:
    for name, share in (("none", 0.0), ("half", 0.5)):
        distill(replace(stage, on_policy=share), tmp_path / name, show=False)
    assert not same(tmp_path / "none", tmp_path / "half")


@pytest.mark.slow
def test_a_served_teacher_answers_for_what_the_student_writes(
    stage: DistillConfig,
    server: Server,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight.mul_(0.5)
    student = str(saved(tmp_path / "student", tiny_llama, tiny_tokenizer))
    run = distill(replace(stage, teacher=server.url, student=student, keep=None), tmp_path / "made", show=False)
    assert run.card.cost["losses"]["forward_kl"] > 0


def test_a_teacher_with_tokens_of_its_own_does_not_write_along() -> None:
    check_rollout_tokenizers(RolloutConfig(name="gkd", share=0.5), uses_teacher_tokens=True)
    with pytest.raises(VocabularyMismatch, match="--rollout gkd"):
        check_rollout_tokenizers(RolloutConfig(name="minillm", share=0.5), uses_teacher_tokens=True)


def test_a_share_of_zero_writes_nothing_and_distillm_begins_by_it() -> None:
    assert not RolloutConfig().is_enabled
    assert RolloutConfig(share=0.1).is_enabled
    assert RolloutConfig(name="distillm").is_enabled
