"""The seconds of an optimizer step of a distillation, measured on this machine."""

import dataclasses

from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.prepare import prepare
from potstill.stages.resources.profiling import WARM_UP_STEPS, profile_steps

MEASURED_STEPS = 8  # after the steps that warm up


def measure_seconds_per_step(config: DistillConfig) -> float:
    """The median seconds of an optimizer step, with the run's own models, text and objective. Nothing is written."""
    tokens_per_step = config.settings.packs_per_step * config.settings.context
    settings = dataclasses.replace(config.settings, tokens=(WARM_UP_STEPS + MEASURED_STEPS) * tokens_per_step)
    run = prepare(dataclasses.replace(config, settings=settings, documents=1))
    teachers = [teacher.model for teacher in run.pair.loaded_teachers.values() if config.objective.uses_teacher]
    measurements = profile_steps(run.module, teachers, run.packs, settings, measured_steps=MEASURED_STEPS)
    return sum(measurements.seconds.values())
