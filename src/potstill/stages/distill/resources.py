"""The memory and disk of a distillation, compared with what the machine has."""

from pathlib import Path

import torch

from potstill.core.blueprint import Blueprint
from potstill.core.errors import ArtifactError, UnsupportedModel
from potstill.core.memory import read_resident_memory, trim_memory
from potstill.data.packing import Packs
from potstill.evaluate.size import count_blueprint_parameters
from potstill.models.families.registry import read_blueprint
from potstill.stages.console import print_note
from potstill.stages.distill.config import DistillConfig
from potstill.stages.model_pair import ModelPair
from potstill.stages.resources.dataset_stats import (
    PackingStats,
    TeacherTokenization,
    compute_packing_stats,
    measure_teacher_tokenization,
)
from potstill.stages.resources.estimate import GIB, measure_tokenizer_bytes
from potstill.stages.resources.machine import AvailableResources, get_available_resources
from potstill.stages.resources.profiling import measure_autograd_bytes
from potstill.stages.resources.workload import FLOAT32_BYTES, Workload
from potstill.teachers.external import ExternalTeacher


def build_workload(
    stage: DistillConfig,
    teacher: Blueprint,
    student: Blueprint,
    *,
    vocabulary: int,
    dtype: torch.dtype,
    packing: PackingStats,
    teacher_tokenization: TeacherTokenization | None = None,
) -> Workload:
    """The sizes of a stage; `apart` is how a teacher with another tokenizer reads the text."""
    source = "cached" if stage.teacher_cache else "live"
    return Workload(
        teacher=teacher,
        student=student,
        vocabulary=vocabulary,
        settings=stage.settings,
        packing=packing,
        source=source if stage.objective.uses_teacher else "alone",
        lora=stage.lora,
        compute_bytes=dtype.itemsize,
        objective=stage.objective,
        teacher_tokenization=teacher_tokenization,
    )


def warn_if_insufficient(
    stage: DistillConfig, pair: ModelPair, packs: Packs, dtype: torch.dtype, out: Path, *, show: bool = True
) -> None:
    """Says before a run, at no cost, how much memory and disk it takes; of a family that no blueprint says,
    or with a teacher that is not here, or with several, nothing.

    Without `show` it speaks only where the memory is too little.

    Raises: ArtefactError if the disk has not enough room.
    """
    if isinstance(pair.teacher, ExternalTeacher) or len(pair.teachers) > 1:
        return
    try:
        teacher, student = read_blueprint(pair.teacher.model.config), read_blueprint(pair.student.config)
    except UnsupportedModel:
        return
    trim_memory()  # what pruning freed is free for the training, or for others
    tokenization, vocabularies, paired_packs = None, pair.vocabulary_sizes, pair.prepare_packs(packs)
    if isinstance(vocabularies, dict) and paired_packs is not packs:
        tokenization = measure_teacher_tokenization(paired_packs, vocabulary=vocabularies["teacher"])
    packing, vocabulary = (
        compute_packing_stats(packs),
        vocabularies["student"] if isinstance(vocabularies, dict) else vocabularies,
    )
    work = build_workload(
        stage, teacher, student, vocabulary=vocabulary, dtype=dtype, packing=packing, teacher_tokenization=tokenization
    )
    autograd_bytes, available = (
        measure_autograd_bytes(student, dtype=dtype, lora=stage.lora),
        get_available_resources(out, pair.student.device),
    )
    disk_bytes, memory_bytes = (
        work.disk_bytes(measure_tokenizer_bytes(pair.origin.tokenizer))["most"],
        sum(work.memory_bytes(autograd_bytes).values()),
    )
    if disk_bytes > available.disk:
        raise ArtifactError(
            f"the run takes {disk_bytes / GIB:.2f} GiB of disk, and {out} has {available.disk / GIB:.2f} GiB; "
            f"make room, or "
            f"choose another --out"
        )
    summary, is_sufficient = _format_summary(
        memory_bytes, disk_bytes, available, on_cpu=pair.student.device.type == "cpu", model_bytes=_model_bytes(work)
    )
    if show or not is_sufficient:
        print_note(summary)


def _model_bytes(work: Workload) -> float:
    """Bytes of student and teacher, which are there already."""
    return float(
        FLOAT32_BYTES * count_blueprint_parameters(work.student).total
        + work.compute_bytes * count_blueprint_parameters(work.teacher).total
    )


def _format_summary(
    memory_bytes: float, disk_bytes: float, available: AvailableResources, *, on_cpu: bool, model_bytes: float
) -> tuple[str, bool]:
    """The short form, and whether the memory is enough."""
    process_bytes = read_resident_memory() if on_cpu else model_bytes
    memory_bytes += max(process_bytes - model_bytes, 0.0)
    summary = f"the run takes about {memory_bytes / GIB:.1f} GiB of memory and {disk_bytes / GIB:.2f} GiB of disk"
    if available.memory is None or memory_bytes - process_bytes <= available.memory:
        return summary, True
    available_gib = (available.memory + process_bytes) / GIB
    return f"{summary}, but only {available_gib:.1f} GiB of memory can be had; potstill plan says what to change", False
