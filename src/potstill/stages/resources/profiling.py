"""Times a few real steps of a run, with the trainer, training module and optimizer that the run itself uses."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from potstill.core.memory import get_peak_memory, reset_peak_memory, retain_freed_memory, trim_memory
from potstill.core.types import IGNORE
from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks
from potstill.data.packing import Packs
from potstill.models.hooks import temporary_hooks
from potstill.models.signals import unwrap_model
from potstill.stages.resources.calibration import SAMPLING, StepMeasurements
from potstill.stages.resources.layer_timing import synchronized_time
from potstill.train.activation_checkpointing import apply_block_settings
from potstill.train.config import TrainConfig
from potstill.train.rollouts.steps import AnyRollout, get_updates
from potstill.train.run import silence_libraries
from potstill.train.trainer import Trainer
from potstill.train.training_arguments import make_training_arguments
from potstill.train.training_module import TrainingModule

WARM_UP_STEPS, MEASURED_STEPS = 3, 5  # the first three touch memory for the first time, so they are slower
MIN_MEASURED_STEPS, MAX_MEASURED_SECONDS = 3, 15.0  # measuring stops after so many steps once it took so many seconds
MAX_PROFILING_SECONDS = 120.0  # of all steps, with those of the warm-up


def profile_steps(
    module: TrainingModule,
    teachers: Sequence[PreTrainedModel],
    packs: Packs | CrossTokenizerPacks,
    settings: TrainConfig,
    *,
    measured_steps: int = MEASURED_STEPS,
    rollout: AnyRollout | None = None,
) -> StepMeasurements:
    """Train up to `measured_steps` steps of `module` on `packs`, in a temporary folder. This changes the student.

    What a `rollout` writes is a part of its own, `sampling`. No step begins after `MAX_PROFILING_SECONDS`, and a
    warm-up step counts if it was the last.
    """
    device = next(module.student.parameters()).device
    steps = WARM_UP_STEPS + measured_steps
    short_settings = replace(
        settings, tokens=steps * settings.packs_per_step * settings.context, report_to=(), eval_every=0, patience=0
    )
    modules: list[tuple[str, nn.Module]] = [("student", unwrap_model(model).base_model) for model in module.students]
    modules += [("loss", module.objective), *(("teacher", teacher.base_model) for teacher in teachers)]  # type: ignore[list-item]
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        args = make_training_arguments(short_settings, Path(folder), device=device.type)
        args.save_strategy = SaveStrategy.NO
        timer = StepTimer(modules, device)
        trainer = ProfiledTrainer(module, args, train_dataset=packs, callbacks=[timer], rollout=rollout)
        trainer.timer = timer
        hooks = [*timer.register_hooks(), module.register_forward_pre_hook(timer.count_tokens, with_kwargs=True)]
        trim_memory()
        reset_peak_memory(device)
        with temporary_hooks(hooks), retain_freed_memory(), apply_block_settings(module, settings):  # as in `train`
            trainer.train()
    updates = get_updates(rollout) or 1
    return StepMeasurements.from_steps(
        timer.measured_steps or timer.steps[-1:],
        peak=float(get_peak_memory(device)),
        draws=[step[SAMPLING] for step in timer.steps[::updates] if SAMPLING in step],
        updates=updates,
    )


def estimate_profiling_seconds(step_seconds: float) -> float:
    """Seconds that `profile_steps` takes for steps of `step_seconds` each."""
    return (
        WARM_UP_STEPS + min(MEASURED_STEPS, max(MIN_MEASURED_STEPS, math.ceil(MAX_MEASURED_SECONDS / step_seconds)))
    ) * step_seconds


class ProfiledTrainer(Trainer):
    """The trainer of a run, which times what its rollout writes."""

    timer: "StepTimer"

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """The batches of a step, as in a run."""
        if self.rollout is None:
            return super().get_batch_samples(*arguments)
        self.timer.start(SAMPLING)
        try:
            return super().get_batch_samples(*arguments)
        finally:
            self.timer.stop(SAMPLING)


class StepTimer(TrainerCallback):
    """Times the parts of each step, in seconds. `modules` are timed in their forwards; those of one name add up.

    All time outside of these parts and the optimizer counts as backward: autograd, clipping and reading the batch.
    Forwards while a rollout samples are no part of their own.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], device: torch.device) -> None:
        self.modules, self.device = modules, device
        self.steps: list[dict[str, float]] = []
        self._current_step: dict[str, float] = {}
        self._start_times: dict[str, float] = {}
        self._measured_seconds = self._total_seconds = 0.0

    @property
    def measured_steps(self) -> list[dict[str, float]]:
        """The steps after the warm-up."""
        return self.steps[WARM_UP_STEPS:]

    def register_hooks(self) -> list[Any]:
        """Hooks on the timed modules. The caller has to remove each of them."""
        handles = []
        for name, module in self.modules:
            handles.append(module.register_forward_pre_hook(lambda *_, part=name: self.start(part)))
            handles.append(module.register_forward_hook(lambda *_, part=name: self.stop(part)))
        return handles

    def start(self, part: str) -> None:
        """Record the time at which a part begins."""
        if SAMPLING not in self._start_times:
            self._start_times[part] = synchronized_time(self.device)

    def stop(self, part: str) -> None:
        """Add the seconds since the part began."""
        if part == SAMPLING or SAMPLING not in self._start_times:
            self._accumulate(part, synchronized_time(self.device) - self._start_times.pop(part))

    def count_tokens(self, module: nn.Module, args: tuple[Any, ...], batch: Mapping[str, Tensor]) -> None:
        """Add the tokens and trained rows of a pass."""
        self._accumulate("tokens", float(batch["input_ids"].numel()))
        self._accumulate("rows", float((batch["labels"] != IGNORE).sum()))

    def _accumulate(self, name: str, amount: float) -> None:
        self._current_step[name] = self._current_step.get(name, 0.0) + amount

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the first step."""
        self.start("step")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start timing the optimizer."""
        self.start("optimizer")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop timing the optimizer."""
        self.stop("optimizer")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the step, start the next one, and stop training once enough steps were measured."""
        self.stop("step")
        step_seconds = self._current_step.pop("step")
        part_seconds = sum(seconds for name, seconds in self._current_step.items() if name not in ("tokens", "rows"))
        self.steps.append({**self._current_step, "backward": max(0.0, step_seconds - part_seconds)})
        self._current_step = {}
        self._measured_seconds += step_seconds if self.measured_steps else 0.0
        self._total_seconds += step_seconds
        control.should_training_stop |= self._total_seconds >= MAX_PROFILING_SECONDS or (
            len(self.measured_steps) >= MIN_MEASURED_STEPS and self._measured_seconds >= MAX_MEASURED_SECONDS
        )
        self.start("step")
