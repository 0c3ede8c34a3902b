"""What a run shows while it trains: a line that moves, a JSONL file that stays, and a way to stop."""

import contextlib
import json
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from potstill.core.artefact import write_text
from potstill.train import ranks

METRICS = "metrics.jsonl"
ECHO = 2.0  # seconds: a launcher hands on the Ctrl-C that the terminal has given to each rank already


def peak_memory(device: str = "cpu") -> int:
    """Largest memory so far, in bytes: of the process on a CPU, of the allocator on a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def forget_peak(device: str = "cpu") -> None:
    """Lets `peak_memory` count from now on, where the system can: on a GPU, and on Linux."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # 5: the peak of the resident set


class Record(TrainerCallback):
    """Appends every log line to `metrics.jsonl` with the tokens seen, tokens/s and peak memory.

    `seconds` is the time of the step alone, without the evaluations and checkpoints between steps.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.last = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops the lines that a resumed run is going to write again, and one that a crash cut short."""
        if state.is_world_process_zero and self.file.exists():
            kept = [line for line in read_metrics(self.file) if line["step"] <= state.global_step]
            write_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))
        self._restart(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves the evaluation out of the next step's time."""
        self._restart(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves the checkpoint out of the next step's time."""
        self._restart(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one line; Hugging Face's summary of the whole run is none."""
        if not state.is_world_process_zero or logs is None or "train_loss" in logs:
            return
        own = {k: v for k, v in logs.items() if not k.startswith("train_") and k != "num_input_tokens_seen"}
        line = {"step": state.global_step, "tokens": state.num_input_tokens_seen, **own}
        if "loss" in logs:
            then, tokens = self.last
            self._restart(state)
            line["seconds"] = max(self.last[0] - then, 1e-9)
            line["tokens_per_second"] = (self.last[1] - tokens) / line["seconds"]
            line["peak_memory"] = peak_memory(args.device.type)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _restart(self, state: TrainerState) -> None:
        self.last = (time.perf_counter(), state.num_input_tokens_seen)


def read_metrics(file: Path) -> list[dict[str, int | float]]:
    """The whole lines of a metrics file; nothing where there is none."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


class Show(TrainerCallback):
    """A progress line on stderr: step, tokens/s, time left, each term, memory."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.start = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the line."""
        self.start = (time.perf_counter(), state.num_input_tokens_seen)
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
        """Moves the line."""
        hidden = ("epoch", "learning_rate", "grad_norm", "loss")
        terms = [f"{k} {v:.3f}" for k, v in (logs or {}).items() if k not in hidden and isinstance(v, float)]
        speed = (state.num_input_tokens_seen - self.start[1]) / max(time.perf_counter() - self.start[0], 1e-9)
        memory = peak_memory(args.device.type) / 2**30
        facts = "  ".join([f"{speed:,.0f} tok/s", *terms[:4], f"{memory:.1f} GiB"])
        self.progress.update(self.task, completed=state.global_step, facts=facts)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the line."""
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was, however training ended."""
        self.progress.stop()


class Interrupt(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) saves a checkpoint after the step in hand and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.asked, self.since = False, 0.0
        self.echo = ECHO if ranks.count() > 1 else 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():  # only there does Python take signals
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self.since > self.echo:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.since = True, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks the trainer to save and stop, on every rank as soon as one was asked."""
        asked = torch.tensor(int(self.asked), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked:
            self.asked = control.should_save = control.should_training_stop = True
