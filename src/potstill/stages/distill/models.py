"""Read the models and caches of a distillation, and refuse those that do not fit together."""

from collections.abc import Mapping
from pathlib import Path

import torch

from potstill.core.device import get_dtype_name
from potstill.core.errors import ArtifactError, NotFound, UsageError, VocabularyMismatch
from potstill.models.fingerprint import fingerprint_teacher, fingerprint_tokenizer
from potstill.models.load import LoadedModel
from potstill.models.quantization import check_trainable
from potstill.models.tokenizers.vocabulary import count_shared_ids, count_token_ids
from potstill.stages.console import print_note
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.ensemble import TeacherSource
from potstill.stages.model_pair import ModelPair
from potstill.stages.prune import PruneConfig
from potstill.stages.run_models import load_run_model
from potstill.stages.stage import make_parent
from potstill.teachers.cached import TeacherCache, find_faults
from potstill.teachers.external import ExternalTeacher, check_cache_supports

Caches = Mapping[str, TeacherCache]  # by the name of the teacher's network


def open_caches(config: DistillConfig) -> dict[str, TeacherCache]:
    """The caches that the student learns from, by the name of their teacher's network.

    Raises: ArtifactError for a cache that is not whole; UsageError for one that does not serve the objective.
    """
    caches = {source.network: _open_cache(config, source.cache) for source in config.teachers if source.cache}
    ensemble = config.teacher_options.ensemble
    if ensemble is not None and ensemble.combination == "confidence":
        _check_confidence_caches(caches)
    return caches


def _open_cache(config: DistillConfig, path: str) -> TeacherCache:
    if config.settings.eval_every:
        raise UsageError("--eval-every reads held-out text, which --teacher-cache does not hold; give one of them")
    folder = Path(path).expanduser()
    if fault := next(find_faults(folder), None):
        raise ArtifactError(f"the cache {folder} is not whole: {fault}; make it again")
    cache = TeacherCache(folder)
    check_cache_supports(config.objective, cache.manifest)
    return cache


def _check_confidence_caches(caches: Caches) -> None:
    """Refuse caches of sampled tokens where confidence weighs teachers: they lack the likelihood of the text itself."""
    sampled_folders = [cache.folder for cache in caches.values() if cache.manifest.is_sampled]
    if sampled_folders:
        raise UsageError(
            f"the cache {sampled_folders[0]} holds sampled tokens, which do not give its teacher's confidence in the "
            f"text; capture --top-k, or give --combine average"
        )


def check_caches(config: DistillConfig, caches: Caches, pair: ModelPair, dtype: torch.dtype) -> None:
    """Refuse a cache of another teacher, tokenizer, dtype, context or temperature than the run's.

    Raises: CacheMismatch.
    """
    for network, cache in caches.items():
        teacher = pair.teachers[network]
        temperature = {} if config.objective.needs_only_last_hidden else {"temperature": config.objective.temperature}
        cache.check_facts(
            {
                **(fingerprint_teacher(teacher) if isinstance(teacher, LoadedModel) else {}),
                "dtype": get_dtype_name(dtype),
                **fingerprint_tokenizer(pair.origin.tokenizer),
                "context": config.settings.context,
                "vocabulary": pair.vocabulary,
                **temperature,
            }
        )


def load_models(config: DistillConfig, caches: Caches, dtype: torch.dtype) -> ModelPair:
    """The student and its teachers in memory; a student that has to be pruned is pruned in `dtype`.

    Raises: NotFound, VocabularyMismatch, UnsupportedModel, CacheMismatch, as reading or comparing the models does.
    """
    check_student(config)
    try:
        pair = _load_first_pair(config, caches, dtype)
        for source in config.teachers[1:]:
            pair = add_teacher(config, pair, source, caches.get(source.network))
        return pair.limit_vocabulary()
    except VocabularyMismatch as error:
        if len(config.teachers) == 1:
            raise
        message = str(error).partition(";")[0]  # the advice for one teacher does not help several
        raise VocabularyMismatch(f"{message}; of several teachers each needs the student's tokenizer") from error


def check_student(config: DistillConfig) -> None:
    """Refuse a quantized student, or a quantized teacher to prune, before any weights are read.

    Raises: UnsupportedModel.
    """
    name = config.student or config.teachers[0].location
    if name is not None:
        check_trainable(name, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)


def _load_first_pair(config: DistillConfig, caches: Caches, dtype: torch.dtype) -> ModelPair:
    source = config.teachers[0]
    cache = caches.get(source.network)
    teacher = load_teacher(config, source, cache)
    if config.student is None:
        assert teacher is not None
        return _prune_student(config, source.network, teacher, dtype)
    student = load_run_model(config, config.student)
    if teacher is not None:
        return pair_models(config, student, teacher, network=source.network)
    external = ExternalTeacher.from_cache_or_server(source.location, cache, student.tokenizer, top_k=source.top_k)
    parents = [make_parent("student", student), external.parent]
    return ModelPair(student.model, student, {source.network: external}, external.vocabulary, parents, {})


def add_teacher(config: DistillConfig, pair: ModelPair, source: TeacherSource, cache: TeacherCache | None) -> ModelPair:
    """`pair` with one more teacher. Raises: VocabularyMismatch, NotFound."""
    teacher: LoadedModel | ExternalTeacher | None = load_teacher(config, source, cache)
    if isinstance(teacher, LoadedModel):
        num_shared, parent = count_shared_ids(teacher.tokenizer, pair.origin.tokenizer), make_parent("teacher", teacher)
    else:
        tokenizer = pair.origin.tokenizer
        teacher = ExternalTeacher.from_cache_or_server(source.location, cache, tokenizer, top_k=source.top_k)
        num_shared, parent = teacher.vocabulary, teacher.parent
    return pair._replace(
        teachers={**pair.teachers, source.network: teacher},
        vocabulary=min(pair.vocabulary, num_shared),
        parents=[*pair.parents, parent],
    )


def pair_models(
    config: DistillConfig, student: LoadedModel, teacher: LoadedModel, *, network: str = "teacher"
) -> ModelPair:
    """A student and a teacher that are here, with one tokenizer or, where the objective compares across, with two.

    Raises: VocabularyMismatch.
    """
    parents = [make_parent("student", student), make_parent("teacher", teacher)]
    teachers = {network: teacher}
    try:
        vocabulary = count_shared_ids(teacher.tokenizer, student.tokenizer)
        return ModelPair(student.model, student, teachers, vocabulary, parents, {})
    except VocabularyMismatch:
        if not config.objective.supports_cross_tokenizer:
            raise
    return ModelPair(
        student.model,
        student,
        teachers,
        count_token_ids(student.tokenizer),
        parents,
        {},
        is_cross_tokenizer=True,
        needs_teacher_tokens=config.objective.uses_teacher,
        needs_edit_alignment=config.objective.needs_edit_alignment,
    )


def _prune_student(config: DistillConfig, network: str, teacher: LoadedModel, dtype: torch.dtype) -> ModelPair:
    prune_config = PruneConfig(
        model=teacher.name,
        data=config.data,
        columns=config.columns,
        keep=config.keep,
        params=config.params,
        strategy=config.strategy,
        seed=config.settings.seed,
        device=config.device,
        dtype=get_dtype_name(dtype),
    )
    student, card = prune_config.apply(teacher)
    vocabulary = count_shared_ids(teacher.tokenizer, teacher.tokenizer)
    parents = [make_parent("teacher, which it was pruned from", teacher)]
    return ModelPair(student, teacher, {network: teacher}, vocabulary, parents, dict(card.details))


def load_teacher(config: DistillConfig, source: TeacherSource, cache: TeacherCache | None) -> LoadedModel | None:
    """The teacher's weights; None for a server, or where the weights are missing and a cache replaces them.

    Raises: NotFound where nothing replaces them.
    """
    if source.location is None or source.kind == "served":
        return None
    try:
        return load_run_model(config, source.location)
    except NotFound:
        if cache is None or config.student is None or config.objective.needs_only_last_hidden:
            raise
        print_note(f"{source.location} is not here; its cache replaces it in training, and it is not measured")
        return None
