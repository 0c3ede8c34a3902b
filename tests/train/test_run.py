"""Whole training runs on a tiny model: what must not change, and what must survive."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import assert_same_bits, settings, some_packs, study_of, weights
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import ArtifactError, MissingDependency, TrainingDiverged, UsageError
from potstill.data.packing import collate
from potstill.train import checkpoint
from potstill.train import run as running
from potstill.train.lora import add_adapters
from potstill.train.run import compute_run_id, read_run_metrics, train


@contextmanager
def interrupted_in_step(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C while the step is being computed."""

    class Pressed(running.InterruptCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(running, "InterruptCallback", Pressed)
        yield


def losses(folder: Path) -> list[tuple[float, ...]]:
    """Step, tokens, loss and terms of each line of the log."""
    found = [line for line in read_run_metrics(folder) if "loss" in line]
    return [(x["step"], x["tokens"], x["loss"], x["forward_kl"], x["grad_norm"], x["learning_rate"]) for x in found]


def test_eight_small_passes_train_as_one_large_one_does(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.double()
    ends = []
    for micro in (256, 32):
        study = study_of(tiny_llama)
        changes = settings(batch_tokens=256, micro_tokens=micro, tokens=3 * 256)
        train(study, some_packs(), changes, tmp_path / str(micro), show=False)
        ends.append(weights(study))
    for name, whole in ends[0].items():
        torch.testing.assert_close(whole, ends[1][name], rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(w, tiny_llama.state_dict()[n]) for n, w in ends[0].items())
    # Adam does not mind a gradient that is 8 times too large, but its norm and the loss show it
    for once, eight in zip(losses(tmp_path / "256"), losses(tmp_path / "32"), strict=True):
        assert once == pytest.approx(eight, rel=1e-6)


def test_a_resumed_run_ends_with_the_very_bits_of_one_that_never_stopped(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, again = study_of(tiny_llama), study_of(tiny_llama)
    whole = train(straight, some_packs(), settings(), tmp_path / "a", show=False)
    with interrupted_in_step(3, monkeypatch):
        cut = train(study_of(tiny_llama), some_packs(), settings(), tmp_path / "b", show=False)
    assert (cut.finished, cut.steps) == (False, 3)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as log:  # what a crash two steps later would have left
        log.write('{"step": 4, "tokens": 1, "loss": 9.0}\n{"step": 5, "tok')
    done = train(again, some_packs(), settings(), tmp_path / "b", resume=True, show=False)
    assert done.finished
    assert (done.steps, done.tokens, done.losses) == (whole.steps, whole.tokens, whole.losses)
    assert_same_bits(straight, again)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [line["step"] for line in read_run_metrics(tmp_path / "b")] == [1, 2, 3, 4, 5, 6]


def test_an_interrupt_between_two_checkpoints_saves_and_resumes_with_the_same_bits(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, again = study_of(tiny_llama), study_of(tiny_llama)
    options = settings(micro_tokens=32)  # two passes a step: the interrupt falls before the first
    train(straight, some_packs(), options, tmp_path / "a", show=False)
    with interrupted_in_step(5, monkeypatch):
        cut = train(study_of(tiny_llama), some_packs(), options, tmp_path / "b", show=False)
    assert (cut.finished, cut.steps) == (False, 5)
    train(again, some_packs(), options, tmp_path / "b", resume=True, show=False)
    assert_same_bits(straight, again)


def test_an_interrupt_in_the_last_step_leaves_a_finished_run(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_in_step(2, monkeypatch):
        assert train(study_of(tiny_llama), some_packs(), settings(tokens=128), tmp_path, show=False).finished


def test_resuming_a_run_that_had_ended_trains_no_further(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    first, again = study_of(tiny_llama), study_of(tiny_llama)
    whole = train(first, some_packs(), settings(tokens=192), tmp_path, show=False)
    lines = losses(tmp_path)
    done = train(again, some_packs(), settings(tokens=192), tmp_path, resume=True, show=False)
    assert done.finished
    assert done.steps == whole.steps == 3
    assert done.tokens == whole.tokens
    assert losses(tmp_path) == lines
    assert_same_bits(first, again)


def test_a_damaged_or_half_written_checkpoint_gives_way_to_the_one_before_it(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    straight, again = study_of(tiny_llama), study_of(tiny_llama)
    train(straight, some_packs(), settings(), tmp_path, show=False)
    (tmp_path / "checkpoint-6" / checkpoint.MANIFEST).unlink()
    (tmp_path / ".checkpoint-6.partial" / "checkpoint-6").mkdir(parents=True)
    (tmp_path / ".checkpoint-6.partial" / "checkpoint-6" / "left.over").write_text("of a killed process")
    train(again, some_packs(), settings(), tmp_path, resume=True, show=False)
    assert_same_bits(straight, again)
    assert checkpoint.find_fault(tmp_path / "checkpoint-6", run_id="") is None
    assert not (tmp_path / "checkpoint-6" / "left.over").exists()
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_checkpoint_of_another_run_is_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    study = study_of(tiny_llama)
    train(study, some_packs(), settings(tokens=192), tmp_path, run_id=compute_run_id("one", 1), show=False)
    with pytest.raises(ArtifactError, match="other settings"):
        train(study, some_packs(), settings(), tmp_path, run_id=compute_run_id("one", 2), resume=True, show=False)


def test_early_stopping_ends_the_run_with_the_best_weights(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    options = settings(learning_rate=0.3, tokens=12 * 64, eval_every=1, patience=2, save_every=100)
    validation = some_packs(4, seed=4)
    first, again = study_of(tiny_llama), study_of(tiny_llama)
    stopped = train(first, some_packs(), options, tmp_path, validation=validation, show=False)
    assert stopped.finished
    assert 3 <= stopped.steps < 12
    evaluated = [line["eval_loss"] for line in read_run_metrics(tmp_path) if "eval_loss" in line]
    assert len(evaluated) == stopped.steps
    assert min(evaluated[-2:]) >= min(evaluated[:-2])
    assert not any(min(evaluated[i - 2 : i]) >= min(evaluated[: i - 2]) for i in range(3, len(evaluated)))
    with torch.no_grad():
        found = [first(**collate([validation[i] for i in range(len(validation))]))["loss"].item()]
    assert found == pytest.approx([min(evaluated)], rel=1e-5)
    assert min(evaluated) < evaluated[-1]
    resumed = train(again, some_packs(), options, tmp_path, validation=validation, resume=True, show=False)
    assert (resumed.finished, resumed.steps) == (True, stopped.steps)
    assert_same_bits(first, again)


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_text(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    study = study_of(tiny_llama)
    with torch.no_grad():
        study.student.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingDiverged, match="became nan at step 1, on the batch that begins with the tokens"):
        train(study, some_packs(), settings(), tmp_path / "a", show=False)
    with pytest.raises(TrainingDiverged, match="begins with '"):
        train(study, some_packs(), settings(), tmp_path / "b", tokenizer=tiny_tokenizer, show=False)
    assert not list(tmp_path.glob("*/checkpoint-*"))


def test_a_gradient_that_is_no_number_stops_the_run_before_it_reaches_a_weight(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    study = study_of(tiny_llama)
    passes = iter(range(100))
    study.student.model.norm.weight.register_hook(lambda g: g * float("inf") if next(passes) == 2 else g)
    with pytest.raises(TrainingDiverged, match=r"norm became (nan|inf) at step 3, on the batch"):
        train(study, some_packs(), settings(save_every=1), tmp_path, show=False)
    assert all(torch.isfinite(w).all() for w in weights(study).values())
    assert checkpoint.find_latest_checkpoint(tmp_path, run_id="") == tmp_path / "checkpoint-2"


def test_a_loss_that_explodes_stops_the_run_before_a_checkpoint(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    study = study_of(tiny_llama)
    passes = iter(range(100))

    def spoil(module: Any, given: Any) -> None:
        if next(passes) == 21:
            with torch.no_grad():
                module.norm.weight.mul_(100)

    study.student.model.register_forward_pre_hook(spoil)
    with pytest.raises(TrainingDiverged, match=r"rose from .* at step 22, on the batch that begins with"):
        train(study, some_packs(), settings(tokens=30 * 64, save_every=11), tmp_path, show=False)
    assert checkpoint.find_latest_checkpoint(tmp_path, run_id="") == tmp_path / "checkpoint-11"
    assert read_run_metrics(tmp_path)[-1]["step"] == 22  # what went wrong is in the log


def test_training_mode_never_reaches_the_teacher(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.config.attention_dropout = 0.5
    study = study_of(tiny_llama)
    (teacher,) = list(study._frozen_models)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    modes = []
    teacher.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    teacher.train()
    train(study, some_packs(), settings(tokens=128), tmp_path, show=False)
    assert modes
    assert not any(modes)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not [name for name, _ in study.named_parameters() if "frozen" in name or "teacher" in name]


def test_terms_in_the_log_are_means_over_all_trained_tokens(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    study = study_of(tiny_llama)
    outcome = train(study, some_packs(), settings(tokens=64, learning_rate=1e-9), tmp_path, show=False)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(0.5 * line["cross_entropy"] + 0.5 * line["forward_kl"], rel=1e-5)
    assert outcome.steps == 1
    assert outcome.tokens == line["tokens"] <= 64


def test_the_outcome_says_what_the_run_cost(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    packs = some_packs().take(4)
    outcome = train(study_of(tiny_llama), packs, settings(tokens=4 * 64), tmp_path, show=False)
    lines = read_run_metrics(tmp_path)
    assert outcome.tokens == 2 * packs.num_tokens  # four steps of two packs are two epochs
    assert outcome.seconds == pytest.approx(sum(line["seconds"] for line in lines))
    assert outcome.tokens_per_second == pytest.approx(outcome.tokens / outcome.seconds)
    assert outcome.peak_memory > 2**20
    assert outcome.losses == {name: lines[-1][name] for name in ("cross_entropy", "forward_kl")}
    assert json.loads(json.dumps(outcome.to_dict()))["finished"] is True


@pytest.mark.parametrize("num_packs", [4, 5])
def test_epochs_train_every_token_of_the_packs_so_many_times(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, num_packs: int
) -> None:
    packs = some_packs().take(num_packs)
    outcome = train(study_of(tiny_llama), packs, settings(tokens=None, epochs=2.0), tmp_path, show=False)
    assert (outcome.steps, outcome.tokens) == (2 * -(-num_packs // 2), 2 * packs.num_tokens)


def test_bf16_is_computed_in_but_never_stored_in(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    plain, fast = study_of(tiny_llama), study_of(tiny_llama, compute_dtype=torch.bfloat16)
    for study, place in ((plain, "a"), (fast, "b")):
        train(study, some_packs(), settings(), tmp_path / place, show=False)
    assert {w.dtype for w in weights(fast).values()} == {torch.float32}
    (*_, full), (*_, half) = ([line[2] for line in losses(tmp_path / place)] for place in "ab")
    assert half != full
    assert half == pytest.approx(full, rel=0.03)


def test_adapters_alone_are_trained_and_resume_with_the_same_bits(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapted() -> Any:
        torch.manual_seed(7)  # the adapters' own start
        study = study_of(tiny_llama)
        return type(study)(
            add_adapters(study.student, 2),
            study.objective,
            frozen={"teacher": next(iter(study._frozen_models))},
        )

    straight, again = adapted(), adapted()
    start = weights(straight)
    train(straight, some_packs(), settings(), tmp_path / "a", show=False)
    changed = {name for name, weight in weights(straight).items() if not torch.equal(weight, start[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    with interrupted_in_step(3, monkeypatch):
        train(adapted(), some_packs(), settings(), tmp_path / "b", show=False)
    train(again, some_packs(), settings(), tmp_path / "b", resume=True, show=False)
    assert_same_bits(straight, again)


def test_a_tracker_that_is_not_installed_and_evaluations_without_data_are_refused(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(MissingDependency, match="pip install no_such_tracker"):
        train(study_of(tiny_llama), some_packs(), settings(report_to=("no_such_tracker",)), tmp_path, show=False)
    with pytest.raises(UsageError, match="no evaluation data"):
        train(study_of(tiny_llama), some_packs(), settings(eval_every=2), tmp_path, show=False)


def test_a_disk_that_is_full_costs_the_run_but_not_its_last_checkpoint(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    study = study_of(tiny_llama)
    passes = iter(range(100))

    def fill(module: Any, given: Any) -> None:
        if next(passes) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file grows beyond 20 kB from here on

    study.student.model.register_forward_pre_hook(fill)
    try:
        with pytest.raises(ArtifactError, match="step 6 could not be written"):
            train(study, some_packs(), settings(), tmp_path, show=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.find_latest_checkpoint(tmp_path, run_id="") == tmp_path / "checkpoint-3"
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_run_whose_folder_is_gone_says_so(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    study = study_of(tiny_llama)
    passes = iter(range(100))

    def remove(module: Any, given: Any) -> None:
        if next(passes) == 1:
            (tmp_path / "run" / ".checkpoint-2.partial").write_text("in the way")

    study.student.model.register_forward_pre_hook(remove)
    with pytest.raises(ArtifactError, match="step 2 could not be written"):
        train(study, some_packs(), settings(tokens=128), tmp_path / "run", show=False)
    shutil.rmtree(tmp_path / "run")
