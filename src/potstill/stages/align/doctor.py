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
from potstill.objectives.options import ObjectiveChoice
from potstill.stages.align.checks import list_checks
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.options import AlignOptions, AlignTrainConfig
from potstill.stages.align.prepare import prepare
from potstill.stages.alignment_options import refuse_alignment_options
from potstill.stages.checks.report import Check
from potstill.stages.options import DoctorOptions

COMMAND_OPTIONS = ("teacher", "student", "measure")  # of `doctor` and `plan`, which name the models otherwise


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

    Raises: UsageError for several teachers, without a model, or for an option that no alignment has.
    """
    names = {field.name for field in list_options(AlignOptions)}
    given = {name for name, value in options.items() if value is not None}
    if foreign := [f"--{name.replace('_', '-')}" for name in sorted(given - names - {*COMMAND_OPTIONS})]:
        pronoun = "it" if len(foreign) == 1 else "them"
        raise UsageError(f"an alignment does not read {' and '.join(foreign)}; omit {pronoun}")
    teacher, student = options.get("teacher"), options.get("student")
    if isinstance(teacher, list | tuple):
        if len(teacher) > 1:
            raise UsageError("an alignment has one reference; give --teacher once, and the model as --student")
        teacher = next(iter(teacher), None)
    models = {"model": student or teacher, "reference": teacher if student and teacher != student else None}
    return AlignConfig.from_options({**{name: options[name] for name in given & names}, **models})


def examine_options(options: DoctorOptions, objective: ObjectiveConfig) -> list[Check]:
    """`examine` for the options of `doctor`: `student` is the model, `teacher` its reference.

    A step is as small as the context allows, since nothing is trained.

    Raises: as `make_align_config` and `examine` do.
    """
    values = {field.name: (getattr(options, field.name), field.default) for field in fields(options)}
    given = {name: value for name, (value, default) in values.items() if value != default}
    if objective.temperature != ObjectiveChoice.temperature:
        given["temperature"] = objective.temperature
    context = given.get("context", AlignTrainConfig.context)
    steps = {"batch_tokens": max(context, AlignTrainConfig.batch_tokens)}
    if objective.data == "prompts":
        steps["prompts_per_step"] = 1
    return examine(make_align_config({**given, **steps, "objective": objective.text}))


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
