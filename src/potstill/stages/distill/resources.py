"""The memory and disk of a distillation, compared with what the machine has."""

from dataclasses import replace
from pathlib import Path

import torch

from potstill.core.blueprint import Blueprint
from potstill.core.device import SAVE_DTYPES
from potstill.core.elastic import read_sizes
from potstill.core.errors import UnsupportedModel
from potstill.core.memory import trim_memory
from potstill.data.packing import Packs
from potstill.models.families.registry import read_blueprint
from potstill.objectives.elastic import SIZES_PER_STEP
from potstill.stages.distill.config import DistillConfig
from potstill.stages.model_pair import ModelPair
from potstill.stages.resources.dataset_stats import (
    PackingStats,
    TeacherTokenization,
    compute_packing_stats,
    measure_teacher_tokenization,
)
from potstill.stages.resources.report import report_workload
from potstill.stages.resources.workload import Workload
from potstill.teachers.external import ExternalTeacher
from potstill.train import distributed


def build_workload(
    config: DistillConfig,
    teacher: Blueprint,
    student: Blueprint,
    *,
    vocabulary: int,
    dtype: torch.dtype,
    packing: PackingStats,
    teacher_tokenization: TeacherTokenization | None = None,
    more_teachers: tuple[Blueprint, ...] = (),
) -> Workload:
    """The sizes of a run; `teacher_tokenization` describes the text in a teacher's own tokenizer.

    Under a route each teacher reads its own documents, which count as equal shares.
    """
    source = "cached" if config.teacher_cache else "live"
    return Workload(
        teacher=teacher,
        student=student,
        vocabulary=vocabulary,
        settings=config.settings,
        packing=packing,
        source=source if config.objective.uses_teacher else "alone",
        lora=config.lora,
        train=config.train,
        shards=distributed.world_size() if config.settings.shard else 1,
        compute_bytes=dtype.itemsize,
        saved_bytes=SAVE_DTYPES[config.save_dtype].itemsize,
        objective=config.objective,
        teacher_tokenization=teacher_tokenization,
        more_teachers=more_teachers,
        teacher_share=1 / len(config.teachers) if config.teacher_options.route else 1.0,
        sizes=list_smaller_sizes(student, config.sizes_per_step or SIZES_PER_STEP),
    )


def list_smaller_sizes(student: Blueprint, sizes_per_step: int) -> tuple[tuple[float, Blueprint], ...]:
    """The smaller sizes of an elastic student, each with the share of the steps that train it."""
    smaller = [size.blueprint(student) for size in read_sizes(student)[1:]]
    num_drawn, num_middle = min(sizes_per_step - 2, len(smaller) - 1), len(smaller) - 1
    middle_share = num_drawn / num_middle if num_middle > 0 else 1.0
    return tuple((1.0 if n == num_middle else middle_share, blueprint) for n, blueprint in enumerate(smaller))


def warn_if_insufficient(
    config: DistillConfig, pair: ModelPair, packs: Packs, dtype: torch.dtype, out: Path, *, show: bool = True
) -> None:
    """Print the memory and disk that a run takes, counted without a step; without `show`, only too little memory.

    Prints nothing for a family that no blueprint expresses, for a teacher that is not here, and for several teachers.

    Raises: ArtifactError if the disk has too little room.
    """
    work = count_workload(config, pair, packs, dtype)
    if work is not None:
        tokenizer, device = pair.origin.tokenizer, pair.student.device
        report_workload(work, out, tokenizer=tokenizer, device=device, dtype=dtype, show=show)


def count_workload(config: DistillConfig, pair: ModelPair, packs: Packs, dtype: torch.dtype) -> Workload | None:
    """The sizes of a run whose models are in memory; None where they cannot be counted."""
    if isinstance(pair.teacher, ExternalTeacher) or len(pair.teachers) > 1:
        return None
    try:
        teacher, student = read_blueprint(pair.teacher.model.config), read_blueprint(pair.student.config)
    except UnsupportedModel:
        return None
    trim_memory()  # memory that pruning freed goes back to the system
    tokenization, vocabularies, paired_packs = None, pair.vocabulary_sizes, pair.prepare_packs(packs)
    if isinstance(vocabularies, dict) and paired_packs is not packs:
        tokenization = measure_teacher_tokenization(paired_packs, vocabulary=vocabularies["teacher"])
    return build_workload(
        replace(config, settings=config.settings.resolve_epochs(len(packs))),
        teacher,
        student,
        vocabulary=vocabularies["student"] if isinstance(vocabularies, dict) else vocabularies,
        dtype=dtype,
        packing=compute_packing_stats(packs),
        teacher_tokenization=tokenization,
    )
