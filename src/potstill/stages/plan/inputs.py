"""The inputs of a plan: configs, tokenizers, text and caches, but no weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from potstill.core.blueprint import Blueprint
from potstill.core.device import resolve_device
from potstill.core.errors import UsageError
from potstill.data.packing import Packs
from potstill.models.backbone import Backbone
from potstill.models.spec import read_model_spec
from potstill.stages.dataset import prepare_dataset
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.models import open_caches
from potstill.stages.distill.prepare import make_dataset_config
from potstill.stages.prune import PruneConfig
from potstill.stages.resources.dataset_stats import TeacherTokenization, match_vocabularies
from potstill.stages.run_models import choose_dtype
from potstill.stages.text_options import prepare_tokenizer
from potstill.teachers.cached import TeacherCache
from potstill.transforms.fit import resize_blueprint


class PlanInputs(NamedTuple):
    """The inputs of a plan: both models without weights, the text as packs, and the device.

    `teacher_tokenization` describes the text in the tokens of a teacher with another tokenizer, else None.
    """

    teacher: Blueprint
    student: Blueprint
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    packs: Packs
    device: torch.device
    dtype: torch.dtype
    caches: Mapping[str, TeacherCache]
    teacher_tokenization: TeacherTokenization | None = None
    chats: bool = False
    facts: Mapping[str, Any] = {}  # of the text, as a card has them
    more_teachers: tuple[Blueprint, ...] = ()  # of several teachers, those after the first whose weights are here


def make_pruned_blueprint(stage: DistillConfig, teacher: Blueprint) -> Blueprint:
    """The shape of the pruned student, not its choice of layers, because this reads no weights."""
    prune_stage = PruneConfig(
        model=str(stage.teachers[0].location), keep=stage.keep, params=stage.params, strategy=stage.strategy
    )
    with torch.device("meta"):
        backbone = Backbone(teacher)
    return resize_blueprint(teacher, prune_stage.compute_target_shape(backbone))


def read_inputs(stage: DistillConfig) -> PlanInputs:
    """Read configs, tokenizers, text and caches, but no weights."""
    load_options = {"allow_pickle": stage.allow_pickle, "trust_remote_code": stage.trust_remote_code}
    locations = [source.location for source in stage.teachers if source.kind == "local" and source.location]
    if stage.teachers[0].kind != "local":
        raise UsageError("a plan needs the first teacher's config; give a local model as --teacher")
    teacher, *more_teachers = (read_model_spec(location, **load_options) for location in locations)
    origin = teacher if stage.student is None else read_model_spec(stage.student, **load_options)
    student = origin.blueprint if stage.student is not None else make_pruned_blueprint(stage, teacher.blueprint)
    teachers = (teacher, *more_teachers) if stage.objective.uses_teacher else ()
    for blueprint in (student, *(spec.blueprint for spec in teachers)):
        if stage.settings.context > blueprint.context:
            raise UsageError(
                f"context is {stage.settings.context}, and one of the models takes {blueprint.context} tokens; give a "
                f"shorter one, or convert the model by --to longer"
            )
    device, caches = resolve_device(stage.device), open_caches(stage)
    prepare_tokenizer(origin.tokenizer, stage)
    prepared = prepare_dataset(
        make_dataset_config(stage),
        origin.tokenizer,
        tokens=stage.settings.tokens,
        documents=stage.documents,
        caches=list(caches.values()),
    )
    dtype = choose_dtype(stage, caches)
    packs, chats = prepared.packs, prepared.facts["kind"] != "text"
    vocabulary, tokenization = match_vocabularies(teacher, origin, packs, stage.objective, chats=chats)
    return PlanInputs(
        teacher.blueprint,
        student,
        origin.tokenizer,
        vocabulary,
        packs,
        device,
        dtype,
        caches,
        tokenization,
        chats,
        prepared.facts,
        tuple(spec.blueprint for spec in more_teachers),
    )
