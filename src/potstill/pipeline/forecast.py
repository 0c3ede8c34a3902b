"""What a run is going to take: memory, disk and time, from a workload and a calibration; and its short form."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from potstill.core import backend
from potstill.core.blueprint import Blueprint
from potstill.core.errors import ArtefactError, UnsupportedModel
from potstill.data.pack import Packs
from potstill.evaluate.size import stored
from potstill.models.families.table import read
from potstill.pipeline.absent import Absent
from potstill.pipeline.calibrate import Calibration
from potstill.pipeline.pair import Pair
from potstill.pipeline.probe import Pace
from potstill.pipeline.rehearse import saved_bytes
from potstill.pipeline.room import Room, resident, room
from potstill.pipeline.stage import note
from potstill.pipeline.texture import Otherwise, Texture, otherwise, texture
from potstill.pipeline.workload import WIDE, Saved, Workload

if TYPE_CHECKING:
    from potstill.pipeline.distill import Distill

GIB = 2**30
LOGITS = 10  # bytes an entry of the logits that pruning's loss, which is not fused, holds: bf16, float32, its gradient
BATCH = 2048  # tokens that pruning measures at once (`texts.calibration`)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes and seconds by part. `phases` are the peaks of a run's phases; the largest is the run's peak."""

    memory: dict[str, float]
    phases: dict[str, float]
    disk: dict[str, float]
    seconds: dict[str, float]
    steps: int
    tokens: float

    @property
    def peak(self) -> float:
        """The most memory that the run holds."""
        return max(self.phases.values())

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        time = {
            "steps": self.steps,
            "seconds_per_step": self.step,
            "parts": self.seconds,
            "seconds": self.step * self.steps,
            "tokens_per_second": self.tokens / self.step,
        }
        return {"memory": {**self.memory, "peak": self.peak}, "phases": self.phases, "disk": self.disk, "time": time}


def forecast(
    work: Workload, saved: Saved, pace: Pace, rates: Calibration, *, tokenizer: int, pruning: float = 0.0
) -> Forecast:
    """What `work` takes; `pruning` are the bytes that the teacher's pruning holds, beside Python."""
    memory = {**work.memory(saved), "beside": rates.beside}
    phases = {"loading": rates.beside + work.loading(), "training": sum(memory.values())}
    if pruning:
        phases["pruning"] = rates.beside + pruning
    return Forecast(
        memory=memory,
        phases=phases,
        disk=work.disk(tokenizer),
        seconds=rates.seconds(work, pace),
        steps=work.settings.steps,
        tokens=work.tokens * work.passes,
    )


def pruning_bytes(teacher: Blueprint, student: Blueprint, saved: Saved) -> float:
    """Bytes of cutting `teacher` to `student`: the model and its copy, and, where widths are cut, one pass backwards.

    `saved` is what autograd keeps in our own `Backbone`. Rougher than the rest: within a third or so.
    """
    held = 2 * WIDE * float(stored(teacher).total)
    if student.hidden == teacher.hidden and set(student.layers) <= set(teacher.layers):
        return held + BATCH * teacher.vocabulary * LOGITS / 2  # whole layers go: their harm needs no gradient
    layers = len(teacher.layers)
    activations = BATCH * (layers * saved.per_token_layer + saved.per_token) + layers * saved.per_layer
    return held + activations + BATCH * teacher.vocabulary * LOGITS


def workload_of(
    stage: "Distill",
    teacher: Blueprint,
    student: Blueprint,
    *,
    vocabulary: int,
    dtype: torch.dtype,
    text: Texture,
    apart: Otherwise | None = None,
) -> Workload:
    """The sizes of a stage; `apart` is how a teacher with another tokenizer reads the text."""
    source = "cached" if stage.teacher_cache else "live"
    return Workload(
        teacher=teacher,
        student=student,
        vocabulary=vocabulary,
        settings=stage.settings,
        texture=text,
        source=source if stage.objective.teaches else "alone",
        lora=stage.lora,
        compute_bytes=dtype.itemsize,
        objective=stage.objective,
        otherwise=apart,
    )


def tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a tokenizer takes on disk."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def announce(stage: "Distill", pair: "Pair", packs: Packs, dtype: torch.dtype, out: Path, *, show: bool = True) -> None:
    """Says before a run, at no cost, how much memory and disk it takes; of a family that no blueprint says,
    or with a teacher that is not here, or with several, nothing.

    Without `show` it speaks only where the memory is too little.

    Raises: ArtefactError if the disk has not enough room.
    """
    if isinstance(pair.teacher, Absent) or pair.several:
        return
    try:
        teacher, student = read(pair.teacher.model.config), read(pair.student.config)
    except UnsupportedModel:
        return
    backend.trim()  # what pruning freed is free for the training, or for others
    apart, ids, paired = None, pair.vocabularies, pair.packs(packs)
    if isinstance(ids, dict) and paired is not packs:
        apart = otherwise(paired, vocabulary=ids["teacher"])
    text, own = texture(packs), ids["student"] if isinstance(ids, dict) else ids
    work = workload_of(stage, teacher, student, vocabulary=own, dtype=dtype, text=text, apart=apart)
    saved, free = saved_bytes(student, dtype=dtype, lora=stage.lora), room(out, pair.student.device)
    needed, peak = work.disk(tokenizer_bytes(pair.origin.tokenizer))["most"], sum(work.memory(saved).values())
    if needed > free.disk:
        raise ArtefactError(
            f"the run takes {needed / GIB:.2f} GiB of disk, and {out} has {free.disk / GIB:.2f} GiB; make room, or "
            f"choose another --out"
        )
    said, enough = _said(peak, needed, free, on_cpu=pair.student.device.type == "cpu", models=_models(work))
    if show or not enough:
        note(said)


def _models(work: Workload) -> float:
    """Bytes of student and teacher, which are there already."""
    return float(WIDE * stored(work.student).total + work.compute_bytes * stored(work.teacher).total)


def _said(peak: float, disk: float, free: Room, *, on_cpu: bool, models: float) -> tuple[str, bool]:
    """The short form, and whether the memory is enough."""
    here = resident() if on_cpu else models
    peak += max(here - models, 0.0)
    said = f"the run takes about {peak / GIB:.1f} GiB of memory and {disk / GIB:.2f} GiB of disk"
    if free.memory is None or peak - here <= free.memory:
        return said, True
    left = (free.memory + here) / GIB
    return f"{said}, but only {left:.1f} GiB of memory can be had; potstill plan says what to change", False
