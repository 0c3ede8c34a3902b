"""The checks of an alignment without its training, for `potstill doctor`; `potstill plan` has the same options.

Both commands have the options of a distillation. For an alignment, --student is the model to train and --teacher its
reference; one of them alone is both.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from potstill.core.errors import DataError, UsageError
from potstill.core.options import list_options
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.align.checks import list_checks
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.options import AlignOptions
from potstill.stages.align.prepare import prepare
from potstill.stages.alignment_options import refuse_alignment_options
from potstill.stages.checks.report import Check
from potstill.stages.options import DoctorOptions


def is_alignment(options: Mapping[str, Any]) -> bool:
    """Whether the objective of these options reads preferences, labels or prompts.

    Raises: UsageError, also for options of an alignment beside an objective that trains on text.
    """
    if ObjectiveConfig.from_options(options).data != "text":
        return True
    refuse_alignment_options(options)
    return False


def make_align_config(options: Mapping[str, Any]) -> AlignConfig:
    """The alignment that options of a distillation describe; those at their defaults should be left out.

    Raises: UsageError for several teachers, or without a model.
    """
    teacher, student = options.get("teacher"), options.get("student")
    if isinstance(teacher, list | tuple):
        if len(teacher) > 1:
            raise UsageError("an alignment has one reference; give --teacher once, and the model as --student")
        teacher = next(iter(teacher), None)
    models = {"model": student or teacher, "reference": teacher if student and teacher != student else None}
    names = {field.name for field in list_options(AlignOptions)} - {*models}
    return AlignConfig.from_options({**{name: options[name] for name in names if name in options}, **models})


def examine_options(options: DoctorOptions, objective: str) -> list[Check]:
    """`examine` for the options of `doctor`: `student` is the model, `teacher` its reference.

    Raises: as `make_align_config` and `examine` do.
    """
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    if options.context == DoctorOptions.context:
        del values["context"]
    return examine(make_align_config({**values, "objective": objective}))


def examine(config: AlignConfig) -> list[Check]:
    """Every check that applies to the model, the loss and the data; nothing is trained or written.

    Raises: UsageError, NotFound, VocabularyMismatch and the like, as training would.
    """
    config.inputs.check()
    try:
        run = prepare(config)
    except DataError as error:
        reason = "a run needs answers to learn from"
        return [Check.from_result("data to train on", False, finding=str(error), why=reason, remedy="")]
    return list_checks(config.loss.data, run.make_check_inputs())
