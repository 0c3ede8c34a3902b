"""Callbacks of the trainer: `metrics.jsonl`, the progress line, and Ctrl-C."""

import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from potstill.core.counts import count_noun
from potstill.core.memory import get_peak_memory
from potstill.core.metrics_log import append_metrics, read_metrics, write_metrics
from potstill.core.screen import LONGEST_SILENCE, Verbosity, get_verbosity
from potstill.train import distributed
from potstill.train.progress import BAR_WIDTH, TrainingProgress, compute_line_interval, select_terms

ECHO_SECONDS = 2.0  # a launcher sends each rank the Ctrl-C that the terminal has sent it already


class MetricsCallback(TrainerCallback):
    """Appends every log of the trainer to `metrics.jsonl`, with the tokens seen, tokens/s and peak memory.

    `seconds` is the time of the training steps, without the evaluations and checkpoints between them.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.last_mark = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Delete the lines that a resumed run will write again, and a line that a crash cut short."""
        if state.is_world_process_zero and self.file.exists():
            entries = [entry for entry in read_metrics(self.file) if entry["step"] <= state.global_step]
            write_metrics(self.file, entries)
        self._restart_timer(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Exclude the evaluation from the time of the next step."""
        self._restart_timer(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Exclude the checkpoint from the time of the next step."""
        self._restart_timer(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line for each log except Hugging Face's summary of the whole run."""
        if not state.is_world_process_zero or logs is None or "train_loss" in logs:
            return
        values = {k: v for k, v in logs.items() if not k.startswith("train_") and k != "num_input_tokens_seen"}
        line = {"step": state.global_step, "tokens": state.num_input_tokens_seen, **values}
        if "loss" in logs:
            last_time, last_tokens = self.last_mark
            self._restart_timer(state)
            line["seconds"] = max(self.last_mark[0] - last_time, 1e-9)
            line["tokens_per_second"] = (self.last_mark[1] - last_tokens) / line["seconds"]
            line["peak_memory"] = get_peak_memory(args.device)
        append_metrics(self.file, line)

    def _restart_timer(self, state: TrainerState) -> None:
        self.last_mark = (time.perf_counter(), state.num_input_tokens_seen)


class ProgressLineCallback(TrainerCallback):
    """The progress on stderr: on a terminal one line that changes, elsewhere about twenty plain lines a run.

    Off a terminal there is a line for every evaluation too, and at least one for every minute.
    """

    def __init__(self, title: str, *, is_shown: bool = True) -> None:
        self.title = title
        self.is_shown = is_shown and get_verbosity() > Verbosity.QUIET
        self.start_time, self.start_step, self.start_tokens, self.last_line = 0.0, 0, 0, 0.0
        self.terms: dict[str, float] = {}
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(BAR_WIDTH), TextColumn("{task.fields[text]}"))
        self.bar = Progress(
            *columns, console=self.console, transient=True, disable=not (self.is_shown and self.console.is_terminal)
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the line."""
        self.start_time = self.last_line = time.perf_counter()
        self.start_step, self.start_tokens = state.global_step, state.num_input_tokens_seen
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, text="")
        self.bar.start()
        if not self.console.is_terminal:
            self._print(f"training {self.title}, {count_noun(state.max_steps - state.global_step, 'step')}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the step, and the terms of the last log and of the last evaluation."""
        if logs is None or "train_loss" in logs:
            return
        terms = select_terms(logs)
        is_evaluation = any(name.startswith("eval_") for name in terms)
        other_terms = {name: value for name, value in self.terms.items() if name.startswith("eval_") != is_evaluation}
        self.terms = other_terms | terms if is_evaluation else terms | other_terms
        progress = self._measure_progress(state)
        if not self.console.is_terminal:
            if self._is_line_due(state) or is_evaluation:
                self.last_line = time.perf_counter()
                self._print(progress.make_line())
            return
        title_width = len(self.title) + 1 + BAR_WIDTH + 1
        text = progress.make_terminal_text(self.console.width - title_width)
        self.bar.update(self.task, completed=state.global_step, text=text)

    def _measure_progress(self, state: TrainerState) -> TrainingProgress:
        seconds = max(time.perf_counter() - self.start_time, 1e-9)
        steps = state.global_step - self.start_step
        return TrainingProgress(
            state.global_step,
            state.max_steps,
            seconds_left=seconds / steps * (state.max_steps - state.global_step) if steps else None,
            tokens_per_second=(state.num_input_tokens_seen - self.start_tokens) / seconds,
            terms=self.terms,
        )

    def _is_line_due(self, state: TrainerState) -> bool:
        step = state.global_step
        is_due = step in (self.start_step + 1, state.max_steps) or step % compute_line_interval(state.max_steps) == 0
        return is_due or time.perf_counter() - self.last_line > LONGEST_SILENCE

    def _print(self, line: str) -> None:
        if self.is_shown:
            print(line, file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the line."""
        self.close()

    def close(self) -> None:
        """Remove the line, however training ended."""
        self.bar.stop()


class InterruptCallback(TrainerCallback):
    """The first Ctrl-C or SIGTERM saves a checkpoint after the present step and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.is_requested, self.requested_at = False, 0.0
        self.echo_seconds = ECHO_SECONDS if distributed.world_size() > 1 else 0.0
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "InterruptCallback":
        if (
            threading.current_thread() is not threading.main_thread()
        ):  # the only thread in which Python allows signal handlers
            return self
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            self.previous_handlers[signal_number] = signal.signal(signal_number, self._handle_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for signal_number, handler in self.previous_handlers.items():
            signal.signal(signal_number, handler)

    def _handle_signal(self, signal_number: int, frame: FrameType | None) -> None:
        if self.is_requested and time.monotonic() - self.requested_at > self.echo_seconds:
            raise KeyboardInterrupt
        if not self.is_requested:
            self.is_requested, self.requested_at = True, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the trainer to save and stop, on every rank as soon as one rank received a signal."""
        is_requested = torch.tensor(int(self.is_requested), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(is_requested, torch.distributed.ReduceOp.MAX)
        if is_requested:
            self.is_requested = control.should_save = control.should_training_stop = True
