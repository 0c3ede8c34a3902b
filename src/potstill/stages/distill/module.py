"""Build what a distillation trains: the student and the objective, with the teachers that give the signals."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedModel

from potstill.core.types import Objective, SignalSource
from potstill.models.elastic import get_sizes
from potstill.models.load import LoadedModel
from potstill.models.signals import get_constant_head
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.elastic import build_elastic_objective, check_elastic
from potstill.stages.model_pair import ModelPair, check_causality
from potstill.stages.run_models import make_trainable
from potstill.teachers.cached import TeacherCache
from potstill.teachers.cached_states import CachedHiddenStates
from potstill.teachers.external import ExternalTeacher
from potstill.train.training_module import TrainingModule


def build_module(
    config: DistillConfig,
    pair: ModelPair,
    dtype: torch.dtype,
    caches: Mapping[str, TeacherCache] = MappingProxyType({}),
) -> TrainingModule:
    """The student of `pair` on its device (with adapters if asked for), the objective, and the teachers' signals.

    Raises: UnsupportedModel for a model that sees the token that it is to predict; UsageError if `train` matches no
    parameter, or an elastic student cannot be trained so.
    """
    check_causality(pair)
    sizes = get_sizes(pair.student)
    check_elastic(config, sizes)
    device = pair.student.device
    model = make_trainable(config, pair.student)
    teachers = pair.teachers.items() if config.objective.uses_teacher else ()
    frozen = {network: get_signal_source(config, teacher, caches.get(network)) for network, teacher in teachers}
    objective = build_elastic_objective(config, build_objective(config, pair), sizes)
    if isinstance(objective, nn.Module):
        objective.to(device)
    return TrainingModule(
        model.to(device),
        objective,
        frozen=frozen,
        vocabulary=pair.vocabulary_sizes,
        compute_dtype=dtype,
        sizes=sizes,
    )


def get_signal_source(
    config: DistillConfig, teacher: LoadedModel | ExternalTeacher, cache: TeacherCache | None
) -> PreTrainedModel | SignalSource:
    """The model, cache or server that gives the teacher's signals in training."""
    if isinstance(teacher, ExternalTeacher):
        return teacher.signal_source
    if cache is None:
        return teacher.model
    if config.objective.needs_only_last_hidden:
        return CachedHiddenStates(cache, get_constant_head(teacher.model))
    return cache


def build_objective(config: DistillConfig, pair: ModelPair) -> Objective:
    """The objective; the seed draws its own weights, so that ranks and resumed runs begin alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.settings.seed)
        pair_info = pair.pair_info if config.objective.needs_teacher_model else None
        return config.objective.build(pair_info, config.teacher_options.ensemble)
