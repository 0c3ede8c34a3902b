"""What a run shows: its log, its line on the terminal, its answer to Ctrl-C."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from tests.train.small import settings, some_packs, study_of
from transformers import LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

from potstill.core.metrics_log import read_metrics
from potstill.train.callbacks import InterruptCallback, MetricsCallback
from potstill.train.run import train


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    """Arguments of a run on this CPU."""
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])


def test_a_resumed_log_keeps_what_came_before_and_drops_what_will_be_written_again(
    args: TrainingArguments, tmp_path: Path
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": i, "loss": i / 2}) + "\n" for i in (1, 2, 3, 4)) + '{"step": 5, "lo')
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3, 4]
    MetricsCallback(file).on_train_begin(
        args, TrainerState(global_step=2, is_world_process_zero=True), TrainerControl()
    )
    assert file.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 1.0}\n'


def test_a_log_line_holds_tokens_time_and_memory_and_the_summary_is_left_out(
    args: TrainingArguments, tmp_path: Path
) -> None:
    record, file = MetricsCallback(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl"
    state = TrainerState(global_step=0, is_world_process_zero=True, num_input_tokens_seen=0)
    record.on_train_begin(args, state, TrainerControl())
    state.global_step, state.num_input_tokens_seen = 1, 500
    record.on_log(args, state, TrainerControl(), logs={"loss": 2.0, "train_runtime": 1.0})
    record.on_log(args, state, TrainerControl(), logs={"eval_loss": 3.0})
    record.on_log(args, state, TrainerControl(), logs={"train_loss": 2.0, "train_runtime": 1.0})
    step, evaluation = read_metrics(file)
    assert set(step) == {"step", "tokens", "loss", "seconds", "tokens_per_second", "peak_memory"}
    assert step["tokens_per_second"] * step["seconds"] == pytest.approx(500)
    assert evaluation == {"step": 1, "tokens": 500, "eval_loss": 3.0}


def test_only_the_first_rank_writes(args: TrainingArguments, tmp_path: Path) -> None:
    state = TrainerState(global_step=1, is_world_process_zero=False)
    record = MetricsCallback(tmp_path / "metrics.jsonl")
    record.on_train_begin(args, state, TrainerControl())
    record.on_log(args, state, TrainerControl(), logs={"loss": 2.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_first_ctrl_c_asks_and_the_second_stops_at_once(args: TrainingArguments) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    control = TrainerControl()
    with InterruptCallback() as interrupt:
        interrupt.on_step_end(args, TrainerState(), control)
        assert not control.should_training_stop
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt.on_step_end(args, TrainerState(), control)
        assert control.should_training_stop
        assert control.should_save
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_thread_that_gets_no_signals_can_train_too() -> None:
    asked: list[bool] = []

    def enter() -> None:
        with InterruptCallback() as interrupt:
            asked.append(interrupt.is_requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert asked == [False]


def test_the_line_on_the_terminal_goes_away_with_the_run(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(study_of(tiny_llama), some_packs(), settings(tokens=128), tmp_path, title="a student")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "{'loss'" not in shown.err
    assert "it/s]" not in shown.err
