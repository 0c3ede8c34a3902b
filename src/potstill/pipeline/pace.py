"""How long a step of a training takes here: a few real ones, clocked, and forgotten."""

import dataclasses

from potstill.core import backend
from potstill.models.load import Loaded
from potstill.pipeline.distill import Distill
from potstill.pipeline.pair import models_of
from potstill.pipeline.rehearse import WARM_UP, rehearse
from potstill.pipeline.texts import Text, prepare

MEASURED = 8  # steps, after those that warm up


def seconds_per_step(stage: Distill) -> float:
    """The median seconds of an optimiser step of `stage`, with its own models, text and objective."""
    device, dtype = backend.device(stage.device), stage.compute_dtype(None)
    size = stage.settings.packs_per_step * stage.settings.context
    brief = dataclasses.replace(stage.settings, tokens=(WARM_UP + MEASURED) * size)
    stage = dataclasses.replace(stage, settings=brief)
    pair = stage.pair(dtype)
    text = Text(data=stage.data, columns=stage.columns, context=brief.context, seed=brief.seed)
    prepared = prepare(text, pair.origin.tokenizer, tokens=brief.tokens, models=models_of(pair), documents=1)
    pair = pair._replace(chats=prepared.facts["kind"] != "text")
    pair.student.to(device)
    teacher = pair.teacher.model if isinstance(pair.teacher, Loaded) else None
    if teacher is not None:
        teacher.to(device=device, dtype=dtype)
    study = stage.study(pair, dtype)
    live = teacher if stage.objective.teaches else None
    clocked = rehearse(study, live, pair.packs(prepared.packs), brief, measured=MEASURED)
    return sum(clocked.seconds.values())
