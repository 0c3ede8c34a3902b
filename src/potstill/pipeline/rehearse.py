"""A few real steps of a run, clocked: the trainer, the study and the optimiser are those that the run itself has."""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from potstill.core import backend
from potstill.core.blueprint import Blueprint
from potstill.core.types import IGNORE, Needs, supervised
from potstill.data.pack import Packs, collate
from potstill.data.pairs import Paired
from potstill.models.backbone import Backbone
from potstill.models.families.table import export_model
from potstill.models.signals import plain, signals
from potstill.pipeline.calibrate import Clocked
from potstill.pipeline.probe import now
from potstill.pipeline.workload import Saved
from potstill.train import adapters
from potstill.train.blocks import blocks_run
from potstill.train.progress import forget_peak, peak_memory
from potstill.train.run import quiet
from potstill.train.settings import Settings
from potstill.train.study import Study
from potstill.train.trainer import Trainer, arguments

WARM_UP, MEASURED = 3, 5  # steps; in the first three memory is touched for the first time
LEAST, LONG = 3, 15.0  # of those measured, where they last so many seconds together
PROBE = (64, 128)  # tokens of the two passes whose difference tells what autograd saves per token


def rehearse(
    study: Study,
    teacher: PreTrainedModel | None,
    packs: Packs | Paired,
    settings: Settings,
    *,
    measured: int = MEASURED,
) -> Clocked:
    """Up to `measured` steps of `study` on `packs`, in a folder that vanishes; the student is no longer what it was."""
    device = next(study.student.parameters()).device
    steps = WARM_UP + measured
    brief = replace(
        settings, tokens=steps * settings.packs_per_step * settings.context, report_to=(), eval_every=0, patience=0
    )
    parts: dict[str, nn.Module] = {"student": plain(study.student).base_model, "loss": study.objective}  # type: ignore[dict-item]
    parts |= {} if teacher is None else {"teacher": teacher.base_model}
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(brief, Path(folder), device=device.type)
        args.save_strategy = SaveStrategy.NO
        clock = Clock(parts, device)
        trainer = Trainer(study, args, train_dataset=packs, callbacks=[clock])
        hooks = [*clock.hooks(), study.register_forward_pre_hook(clock.count, with_kwargs=True)]
        backend.trim()
        forget_peak(device.type)
        try:
            with backend.held_memory(), blocks_run(study, settings):  # as `train.run.train` has it
                trainer.train()
        finally:
            for hook in hooks:
                hook.remove()
    return Clocked.of(clock.measured, peak=float(peak_memory(device.type)))


def lasts(step: float) -> float:
    """Seconds that rehearsing steps of so many seconds takes."""
    return (WARM_UP + min(MEASURED, max(LEAST, math.ceil(LONG / step)))) * step


class Clock(TrainerCallback):
    """Seconds of each step by part; `parts` are modules, whose forwards are timed.

    What lies in no part (autograd, clipping, reading the batch) is called the backward.
    """

    def __init__(self, parts: Mapping[str, nn.Module], device: torch.device) -> None:
        self.parts, self.device = parts, device
        self.steps: list[dict[str, float]] = []
        self._step: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._seconds = 0.0

    @property
    def measured(self) -> list[dict[str, float]]:
        """The steps after those that warm up."""
        return self.steps[WARM_UP:]

    def hooks(self) -> list[Any]:
        """Hooks on the parts; each has to be removed."""
        found = []
        for name, module in self.parts.items():
            found.append(module.register_forward_pre_hook(lambda *_, part=name: self.start(part)))
            found.append(module.register_forward_hook(lambda *_, part=name: self.stop(part)))
        return found

    def start(self, part: str) -> None:
        """A part begins."""
        self._since[part] = now(self.device)

    def stop(self, part: str) -> None:
        """A part ends."""
        self._add(part, now(self.device) - self._since.pop(part))

    def count(self, study: nn.Module, args: tuple[Any, ...], batch: Mapping[str, Tensor]) -> None:
        """Tokens and trained rows of a pass."""
        self._add("tokens", float(batch["input_ids"].numel()))
        self._add("rows", float((batch["labels"] != IGNORE).sum()))

    def _add(self, name: str, amount: float) -> None:
        self._step[name] = self._step.get(name, 0.0) + amount

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
        whole = self._step.pop("step")
        timed = sum(seconds for name, seconds in self._step.items() if name not in ("tokens", "rows"))
        self.steps.append({**self._step, "backward": max(0.0, whole - timed)})
        self._step = {}
        self._seconds += whole if self.measured else 0.0
        control.should_training_stop |= len(self.measured) >= LEAST and self._seconds >= LONG
        self.start("step")


def saved_bytes(blueprint: Blueprint, *, dtype: torch.dtype, lora: int = 0, stock: bool = True) -> Saved:
    """What autograd saves of a student, measured on one and two of its layers, at full width, with a short vocabulary.

    It is linear in tokens and in layers, so four passes of some tokens tell. `stock` is the network that is trained;
    without, it is our own `Backbone`, in which pruning measures.
    """
    device = torch.device("cpu")

    def kept(layers: int, tokens: int) -> float:
        small = replace(blueprint, layers=(blueprint.layers[0],) * layers, vocabulary=PROBE[0])
        backbone = Backbone(small).to(device)
        model: Any = export_model(backbone) if stock else backbone
        model = adapters.add(model, lora) if lora else model
        return _kept(model.train(), tokens, dtype)

    (a, b), (c, d) = ([kept(layers, tokens) for tokens in PROBE] for layers in (1, 2))
    step = PROBE[1] - PROBE[0]
    both, one = (d - c) / step, (b - a) / step
    return Saved(both - one, 2 * one - both, (c - PROBE[0] * both) - (a - PROBE[0] * one))


def _kept(model: Any, tokens: int, dtype: torch.dtype) -> float:
    """Bytes of the storages that a forward saves for its backward, each once, the model's own weights left out."""
    ids = torch.arange(tokens) % PROBE[0]
    batch = collate([{"input_ids": ids, "labels": ids, "lengths": torch.tensor([tokens])}])
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}  # alive until they are counted, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        # a graph holds this hook and what it gives: were either to hold a tensor with a graph, it would hold itself
        storage = tensor.untyped_storage()
        held.setdefault(storage.data_ptr(), storage)
        return tensor.detach()

    enabled = dtype != torch.float32
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=enabled),
    ):
        if isinstance(model, Backbone):
            _ = model(batch["input_ids"], batch["position_ids"])
        else:
            _ = signals(model, batch, Needs(supervised(batch)[0]))
    return float(sum(one.nbytes() for place, one in held.items() if place not in own))
