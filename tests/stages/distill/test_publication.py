"""A trained student is never lost to what describes it, and what would fail at the end is found at the start."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.world import interrupted, saved
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerState,
)

from potstill.core.errors import ArtifactError, Interrupted
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.prepare import DistillRun
from potstill.stages.distill.run import distill
from potstill.train.callbacks import InterruptCallback
from potstill.train.config import TrainConfig

SETTINGS = TrainConfig(tokens=256, context=32, batch_tokens=128, micro_tokens=128, save_every=1)
REFUSING = "{{ raise_exception('no user may speak') }}"


@pytest.fixture
def stage(teacher: Path, text: Path) -> DistillConfig:
    return DistillConfig(
        teacher=str(teacher),
        student=str(teacher),
        data=str(text),
        settings=SETTINGS,
        dtype="float32",
        documents=2,
        skip_doctor=True,
    )


def read_card(folder: Path) -> dict[str, dict[str, object]]:
    card: dict[str, dict[str, object]] = json.loads((folder / "card.json").read_text())
    return card


def fail(*_: object) -> None:
    raise torch.OutOfMemoryError("out of memory\nwhile measuring")


@pytest.mark.parametrize("positions", [64, 48], ids=["a few tokens of room", "no room"])
def test_learned_positions_shorten_the_samples_or_leave_them_out(
    positions: int,
    stage: DistillConfig,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer),
        n_positions=positions,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    student = saved(tmp_path / "student", GPT2LMHeadModel(config), tiny_tokenizer)
    distill(replace(stage, student=str(student), teacher=str(student)), tmp_path / "made", show=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "made").config.n_positions == positions
    readme, has_room = (tmp_path / "made" / "README.md").read_text(), positions == 64
    assert ("## Samples" in readme) == has_room
    assert ("tokens too long for the context" in readme) == (not has_room)
    assert ("the card will hold no samples" in capsys.readouterr().err) == (not has_room)


def test_a_template_that_refuses_the_prompts_costs_the_samples_alone(
    stage: DistillConfig, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_tokenizer.chat_template = REFUSING
    student = saved(tmp_path / "student", tiny_llama, tiny_tokenizer)
    distill(replace(stage, student=str(student)), tmp_path / "made", show=False)
    card = read_card(tmp_path / "made")
    assert "no user may speak" in str(card["failures"]["samples"])
    assert {"teacher", "before training", "made"} == set(card["measures"])
    assert (tmp_path / "made" / "model.safetensors").is_file()


def test_measures_that_fail_are_named_in_the_card_and_the_model_is_there(
    stage: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DistillRun, "measure", fail)
    monkeypatch.setattr("potstill.stages.publication.draw_curve", fail)
    distill(stage, tmp_path / "made", show=False)
    assert set(read_card(tmp_path / "made")["failures"]) == {"measures", "picture of the loss"}
    readme = (tmp_path / "made" / "README.md").read_text()
    assert "## Not in this card\n\n- measures: OutOfMemoryError: out of memory while measuring" in readme
    assert "the measures failed" in capsys.readouterr().err
    assert not (tmp_path / "made" / "training").exists()


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def send_signal_after_the_last_step(
    self: InterruptCallback, args: Any, state: TrainerState, control: Any, **_: Any
) -> None:
    if state.global_step == state.max_steps:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("owner", "method", "action"),
    [(DistillRun, "measure", stop), (InterruptCallback, "on_step_end", send_signal_after_the_last_step)],
    ids=["while it measures", "in its last step"],
)
def test_a_run_that_is_stopped_at_its_end_leaves_a_model_and_resumes_to_the_whole_card(
    owner: type,
    method: str,
    action: Callable[..., None],
    stage: DistillConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = distill(stage, tmp_path / "whole", show=False)
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, action)
        with pytest.raises(Interrupted, match=r"the student is saved in .*made, and --resume measures it"):
            distill(stage, tmp_path / "made", show=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert list(read_card(tmp_path / "made")["failures"]) == ["measures and samples"]
    assert (tmp_path / "made" / "training").is_dir()
    distill(stage, tmp_path / "made", resume=True, show=False)
    assert {f.name for f in (tmp_path / "made").iterdir()} == {f.name for f in whole.out.iterdir()}
    assert read_card(tmp_path / "made")["failures"] == {}
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "made"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_student_that_cannot_be_saved_is_refused_before_the_first_step(
    stage: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("this config cannot be saved\nfor many reasons")

    monkeypatch.setattr("potstill.stages.training.train", fail)
    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    with pytest.raises(ArtifactError, match=r"ValueError: this config cannot be saved\); correct the config"):
        distill(stage, tmp_path / "made", show=False)
    assert not (tmp_path / "made").exists()


def test_a_stopped_run_goes_on_in_another_place_with_other_options_that_change_no_result(
    stage: DistillConfig, teacher: Path, tmp_path: Path
) -> None:
    stage = replace(stage, settings=replace(SETTINGS, tokens=512), save_dtype="float32")
    whole = distill(stage, tmp_path / "whole", show=False)
    with interrupted(tmp_path / "made"), pytest.raises(Interrupted):
        distill(stage, tmp_path / "made", show=False)
    (tmp_path / "made").rename(tmp_path / "moved")
    teacher.rename(tmp_path / "elsewhere")
    other = replace(
        stage,
        teacher=str(tmp_path / "elsewhere"),
        student=str(tmp_path / "elsewhere"),
        device="cpu",
        settings=replace(stage.settings, save_every=3, micro_tokens=32),
    )
    distill(other, tmp_path / "moved", resume=True, show=False)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole.out, tmp_path / "moved"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_no_memory_to_open_the_model_again_costs_the_comparison_alone(
    stage: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.stages.saved_model.compute_reload_gap", lambda *_, **__: fail())
    distill(stage, tmp_path / "made", show=False)
    invariants = json.loads((tmp_path / "made" / "card.json").read_text())["invariants"]
    assert "no memory for a second copy" in invariants[-1]["outcome"]
    assert (tmp_path / "made" / "model.safetensors").is_file()
