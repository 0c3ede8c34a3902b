"""Callbacks of the trainer: `metrics.jsonl`, the progress line, and Ctrl-C."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from potstill.core.memory import get_peak_memory
from potstill.core.metrics_log import append_metrics, read_metrics, write_metrics
from potstill.train import distributed

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
    """A progress line on stderr: steps, time left, tokens/s, up to four terms of the loss, memory."""

    def __init__(self, title: str, *, is_shown: bool = True) -> None:
        self.title, self.is_shown = title, is_shown
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
            transient=True,
            disable=not is_shown,
        )
        self.start_mark = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the line."""
        self.start_mark = (time.perf_counter(), state.num_input_tokens_seen)
        self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step, facts="")
        self.progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Update the line."""
        skipped_keys = ("epoch", "learning_rate", "grad_norm", "loss")
        terms = [f"{k} {v:.3f}" for k, v in (logs or {}).items() if k not in skipped_keys and isinstance(v, float)]
        speed = (state.num_input_tokens_seen - self.start_mark[1]) / max(time.perf_counter() - self.start_mark[0], 1e-9)
        memory = get_peak_memory(args.device) / 2**30
        facts = "  ".join([f"{speed:,.0f} tok/s", *terms[:4], f"{memory:.1f} GiB"])
        self.progress.update(self.task, completed=state.global_step, facts=facts)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the line."""
        self.close()

    def close(self) -> None:
        """Remove the line, however training ended."""
        self.progress.stop()


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
