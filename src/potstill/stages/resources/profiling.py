"""A few real steps of a run, clocked: the trainer, the study and the optimiser are those that the run itself has."""

import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from potstill.core.blueprint import Blueprint
from potstill.core.memory import get_peak_memory, reset_peak_memory, retain_freed_memory, trim_memory
from potstill.core.types import IGNORE, Needs, supervised_positions
from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks
from potstill.data.packing import Packs, collate
from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model
from potstill.models.signals import compute_signals, unwrap_model
from potstill.stages.resources.calibration import StepMeasurements
from potstill.stages.resources.layer_timing import synchronized_time
from potstill.stages.resources.workload import AutogradBytes
from potstill.train.activation_checkpointing import apply_block_settings
from potstill.train.config import TrainConfig
from potstill.train.lora import add_adapters
from potstill.train.run import silence_libraries
from potstill.train.trainer import Trainer, make_training_arguments
from potstill.train.training_module import TrainingModule

WARM_UP_STEPS, MEASURED_STEPS = 3, 5  # steps; in the first three memory is touched for the first time
MIN_MEASURED_STEPS, MAX_MEASURED_SECONDS = 3, 15.0  # of those measured, where they last so many seconds together
PROBE_TOKENS = (64, 128)  # tokens of the two passes whose difference tells what autograd saves per token


def profile_steps(
    module: TrainingModule,
    teacher: PreTrainedModel | None,
    packs: Packs | CrossTokenizerPacks,
    settings: TrainConfig,
    *,
    measured_steps: int = MEASURED_STEPS,
) -> StepMeasurements:
    """Up to `measured` steps of `study` on `packs`, in a folder that vanishes; the student is no longer what it was."""
    device = next(module.student.parameters()).device
    steps = WARM_UP_STEPS + measured_steps
    short_settings = replace(
        settings, tokens=steps * settings.packs_per_step * settings.context, report_to=(), eval_every=0, patience=0
    )
    modules: dict[str, nn.Module] = {"student": unwrap_model(module.student).base_model, "loss": module.objective}  # type: ignore[dict-item]
    modules |= {} if teacher is None else {"teacher": teacher.base_model}
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        args = make_training_arguments(short_settings, Path(folder), device=device.type)
        args.save_strategy = SaveStrategy.NO
        timer = StepTimer(modules, device)
        trainer = Trainer(module, args, train_dataset=packs, callbacks=[timer])
        hooks = [*timer.register_hooks(), module.register_forward_pre_hook(timer.count_tokens, with_kwargs=True)]
        trim_memory()
        reset_peak_memory(device)
        try:
            with retain_freed_memory(), apply_block_settings(module, settings):  # as `train.run.train` has it
                trainer.train()
        finally:
            for hook in hooks:
                hook.remove()
    return StepMeasurements.from_steps(timer.measured_steps, peak=float(get_peak_memory(device)))


def estimate_profiling_seconds(step_seconds: float) -> float:
    """Seconds that rehearsing steps of so many seconds takes."""
    return (
        WARM_UP_STEPS + min(MEASURED_STEPS, max(MIN_MEASURED_STEPS, math.ceil(MAX_MEASURED_SECONDS / step_seconds)))
    ) * step_seconds


class StepTimer(TrainerCallback):
    """Seconds of each step by part; `parts` are modules, whose forwards are timed.

    What lies in no part (autograd, clipping, reading the batch) is called the backward.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        self.modules, self.device = modules, device
        self.steps: list[dict[str, float]] = []
        self._current_step: dict[str, float] = {}
        self._start_times: dict[str, float] = {}
        self._measured_seconds = 0.0

    @property
    def measured_steps(self) -> list[dict[str, float]]:
        """The steps after those that warm up."""
        return self.steps[WARM_UP_STEPS:]

    def register_hooks(self) -> list[Any]:
        """Hooks on the parts; each has to be removed."""
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(lambda *_, part=name: self.start(part)))
            handles.append(module.register_forward_hook(lambda *_, part=name: self.stop(part)))
        return handles

    def start(self, part: str) -> None:
        """A part begins."""
        self._start_times[part] = synchronized_time(self.device)

    def stop(self, part: str) -> None:
        """A part ends."""
        self._accumulate(part, synchronized_time(self.device) - self._start_times.pop(part))

    def count_tokens(self, module: nn.Module, args: tuple[Any, ...], batch: Mapping[str, Tensor]) -> None:
        """Tokens and trained rows of a pass."""
        self._accumulate("tokens", float(batch["input_ids"].numel()))
        self._accumulate("rows", float((batch["labels"] != IGNORE).sum()))

    def _accumulate(self, name: str, amount: float) -> None:
        self._current_step[name] = self._current_step.get(name, 0.0) + amount

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first step begins."""
        self.start("step")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimiser begins."""
        self.start("optimiser")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimiser ends."""
        self.stop("optimiser")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step ends and the next begins, if there is to be one."""
        self.stop("step")
        step_seconds = self._current_step.pop("step")
        part_seconds = sum(seconds for name, seconds in self._current_step.items() if name not in ("tokens", "rows"))
        self.steps.append({**self._current_step, "backward": max(0.0, step_seconds - part_seconds)})
        self._current_step = {}
        self._measured_seconds += step_seconds if self.measured_steps else 0.0
        control.should_training_stop |= (
            len(self.measured_steps) >= MIN_MEASURED_STEPS and self._measured_seconds >= MAX_MEASURED_SECONDS
        )
        self.start("step")


def measure_autograd_bytes(
    blueprint: Blueprint, *, dtype: torch.dtype, lora: int = 0, stock: bool = True
) -> AutogradBytes:
    """The bytes that autograd saves of a student, measured on one and two layers of each kind, at full width.

    They are linear in tokens and in layers, so four passes of some tokens, with a short vocabulary, are enough. Layers
    that differ are measured apart, and a layer's bytes are the mean over all. `stock` measures the network that is
    trained; without it, our own `Backbone`, in which pruning measures.
    """
    counts = Counter(blueprint.layers)
    if len(counts) == 1:
        return _measure_layer_bytes(blueprint, dtype=dtype, lora=lora, stock=stock)
    kinds = (replace(blueprint, layers=(layer,)) for layer in counts)
    measured = [_measure_layer_bytes(kind, dtype=dtype, lora=lora, stock=stock) for kind in kinds]
    shares = [count / len(blueprint.layers) for count in counts.values()]
    return AutogradBytes(*(sum(map(mul, values, shares)) for values in zip(*measured, strict=True)))


def _measure_layer_bytes(blueprint: Blueprint, *, dtype: torch.dtype, lora: int, stock: bool) -> AutogradBytes:
    """The bytes that autograd saves of a student whose layers are all like the first of `blueprint`."""
    device = torch.device("cpu")

    def count_bytes(layers: int, tokens: int) -> float:
        small = replace(blueprint, layers=(blueprint.layers[0],) * layers, vocabulary=PROBE_TOKENS[0])
        backbone = Backbone(small).to(device)
        model: Any = export_model(backbone) if stock else backbone
        model = add_adapters(model, lora) if lora else model
        return _count_saved_bytes(model.train(), tokens, dtype)

    (a, b), (c, d) = ([count_bytes(layers, tokens) for tokens in PROBE_TOKENS] for layers in (1, 2))
    token_difference = PROBE_TOKENS[1] - PROBE_TOKENS[0]
    two_layer_slope, one_layer_slope = (d - c) / token_difference, (b - a) / token_difference
    return AutogradBytes(
        two_layer_slope - one_layer_slope,
        2 * one_layer_slope - two_layer_slope,
        (c - PROBE_TOKENS[0] * two_layer_slope) - (a - PROBE_TOKENS[0] * one_layer_slope),
    )


def _count_saved_bytes(model: Any, tokens: int, dtype: torch.dtype) -> float:
    """Bytes of the storages that a forward saves for its backward, each once, the model's own weights left out."""
    ids = torch.arange(tokens) % PROBE_TOKENS[0]
    batch = collate([{"input_ids": ids, "labels": ids, "lengths": torch.tensor([tokens])}])
    weight_pointers = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # alive until they are counted, so that no address comes twice

    def save_tensor(tensor: Tensor) -> Tensor:
        # a graph holds this hook and what it gives: were either to hold a tensor with a graph, it would hold itself
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)
        return tensor.detach()

    enabled = dtype != torch.float32
    with (
        torch.autograd.graph.saved_tensors_hooks(save_tensor, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=enabled),
    ):
        if isinstance(model, Backbone):
            _ = model(batch["input_ids"], batch["position_ids"])
        else:
            _ = compute_signals(model, batch, Needs(supervised_positions(batch)[0]))
    return float(
        sum(tensor_storage.nbytes() for pointer, tensor_storage in storages.items() if pointer not in weight_pointers)
    )
