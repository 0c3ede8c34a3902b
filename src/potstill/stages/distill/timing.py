"""How long a step of a training takes here: a few real ones, clocked, and forgotten."""

import dataclasses

from potstill.core.device import resolve_device
from potstill.models.load import LoadedModel
from potstill.stages.dataset import DatasetConfig, prepare_dataset
from potstill.stages.distill.run import DistillConfig
from potstill.stages.model_pair import get_loaded_models
from potstill.stages.resources.profiling import WARM_UP_STEPS, profile_steps

MEASURED_STEPS = 8  # steps, after those that warm up


def measure_seconds_per_step(stage: DistillConfig) -> float:
    """The median seconds of an optimiser step of `stage`, with its own models, text and objective."""
    device, dtype = resolve_device(stage.device), stage.compute_dtype(None)
    tokens_per_step = stage.settings.packs_per_step * stage.settings.context
    settings = dataclasses.replace(stage.settings, tokens=(WARM_UP_STEPS + MEASURED_STEPS) * tokens_per_step)
    stage = dataclasses.replace(stage, settings=settings)
    pair = stage.load_models(dtype)
    dataset_config = DatasetConfig(data=stage.data, columns=stage.columns, context=settings.context, seed=settings.seed)
    prepared = prepare_dataset(
        dataset_config, pair.origin.tokenizer, tokens=settings.tokens, models=get_loaded_models(pair), documents=1
    )
    pair = pair._replace(is_chat=prepared.facts["kind"] != "text")
    pair.student.to(device)
    teacher = pair.teacher.model if isinstance(pair.teacher, LoadedModel) else None
    if teacher is not None:
        teacher.to(device=device, dtype=dtype)
    module = stage.build_module(pair, dtype)
    live_teacher = teacher if stage.objective.uses_teacher else None
    measurements = profile_steps(
        module, live_teacher, pair.prepare_packs(prepared.packs), settings, measured_steps=MEASURED_STEPS
    )
    return sum(measurements.seconds.values())
