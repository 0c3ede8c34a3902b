"""Several teachers of one student: what each is (a model here, a server, a cache), and how they teach together."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.data.row_reader import Route
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.vocabulary import count_shared_ids
from potstill.objectives.multi_teacher import COMBINATIONS, Combination, TeacherEnsemble
from potstill.stages.model_pair import ModelPair
from potstill.stages.stage import make_parent
from potstill.teachers.cached import TeacherCache, is_cache
from potstill.teachers.external import ExternalTeacher
from potstill.teachers.http_client import is_address
from potstill.teachers.served import TOP_K
from potstill.train.rollouts.config import MINILLM

if TYPE_CHECKING:
    from potstill.stages.distill.run import DistillConfig

NAMED_TEACHER = re.compile(
    r"([^/\\:=]+)=(.+)"
)  # no address and no path of several parts has a = before its first / or :
ROUTED_TEACHER = re.compile(r"([^=]+)=(.+)")  # under a route every teacher is named, by whatever stands in the column
AVERAGE, ROUTE = "average", "route"


class EnsembleConfig(NamedTuple):
    """Teachers by name, how they are combined, and of a route the column of the data that names one."""

    sources: Mapping[str, str]
    combination: Combination
    column: str = ""

    @classmethod
    def from_options(cls, teachers: Sequence[str], combine: str) -> "EnsembleConfig":
        """`NAME=TEACHER` or `TEACHER` each, and `average`, `confidence` or `route:COLUMN`.

        Raises: UsageError.
        """
        combination, _, column = combine.partition(":")
        if combination not in COMBINATIONS or (combination == ROUTE) != bool(column):
            raise UsageError(f"--combine {combine!r} is none of average, confidence and route:COLUMN")
        pattern = ROUTED_TEACHER if combination == ROUTE else NAMED_TEACHER
        named_sources = [
            match.groups() if (match := pattern.fullmatch(option)) else ("", option) for option in teachers
        ]
        if combination == ROUTE and (unnamed_sources := [source for name, source in named_sources if not name]):
            raise UsageError(
                f"--combine {combine} needs the value of {column!r} that each teacher is for; give --teacher "
                f"VALUE={unnamed_sources[0]}"
            )
        names = [name or _get_default_name(source) for name, source in named_sources]
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise UsageError(
                f"two teachers are called {duplicates[0]!r}; name them, as in --teacher one={named_sources[0][1]}"
            )
        sources = dict(zip(names, (source for _, source in named_sources), strict=True))
        return cls(sources, cast(Combination, combination), column)

    @property
    def panel(self) -> TeacherEnsemble:
        """What the objective has to know."""
        return TeacherEnsemble(tuple(self.sources), self.combination)

    @property
    def route(self) -> Route | None:
        """What the reader of the data has to know."""
        return Route(self.column, tuple(self.sources)) if self.column else None


def _get_default_name(source: str) -> str:
    """How a teacher without a name is called: a folder's last part, a server's model or else its address."""
    if is_address(source):
        return source.partition("#")[2] or source
    return Path(source).name or source


def build_single_teacher_configs(stage: "DistillConfig", ensemble: EnsembleConfig) -> "dict[str, DistillConfig]":
    """For each teacher, by its name as a network, the stage in which it alone teaches; building it refuses a wrong one.

    Raises: UsageError where several cannot teach together what is asked.
    """
    _check_combination(stage, ensemble)
    first_source, *_ = ensemble.sources.values()
    first_size = {"student": stage.student, "keep": stage.keep, "params": stage.params}
    later_size = {"student": stage.student or first_source, "keep": None, "params": None}
    configs: dict[str, DistillConfig] = {}
    for source, network in zip(ensemble.sources.values(), ensemble.panel.networks, strict=True):
        is_cached = is_cache(Path(source).expanduser())
        location_options = {"teacher": None, "teacher_cache": source} if is_cached else {"teacher": source}
        size_options = later_size if configs else first_size
        top_k_option = {} if is_address(source) else {"top_k": TOP_K}
        configs[network] = replace(stage, combine=AVERAGE, **{**location_options, **size_options, **top_k_option})  # type: ignore[arg-type]
    return configs


def _check_combination(stage: "DistillConfig", ensemble: EnsembleConfig) -> None:
    objective, rollout_config = stage.objective, stage.rollout_config
    if objective.needs_teacher_model:
        raise UsageError(
            f"{objective.name} learns from the hidden states or the tables of one teacher; with several, choose a "
            f"divergence, such as --objective forward_kl"
        )
    if not objective.uses_teacher:
        raise UsageError("cross_entropy asks no teacher, and one is enough to measure beside; give --teacher once")
    if stage.teacher_cache is not None:
        raise UsageError("with several teachers a cache is one of them; give --teacher CACHE, not --teacher-cache")
    if rollout_config.is_enabled and rollout_config.name == MINILLM:
        raise UsageError("--rollout minillm samples with one teacher; give one, or --rollout gkd")


def load_ensemble(
    stages: "Mapping[str, DistillConfig]", caches: Mapping[str, TeacherCache], dtype: torch.dtype
) -> ModelPair:
    """The student with all its teachers, each checked as if it taught alone; the first is measured beside.

    Raises: VocabularyMismatch for a teacher with other tokens than the student's, and what a stage with one does.
    """
    try:
        return _load_ensemble(stages, caches, dtype)
    except VocabularyMismatch as error:
        message = str(error).partition(";")[0]  # the way out that one teacher has is none for several
        raise VocabularyMismatch(f"{message}; of several teachers each needs the student's tokenizer") from error


def _load_ensemble(
    stages: "Mapping[str, DistillConfig]", caches: Mapping[str, TeacherCache], dtype: torch.dtype
) -> ModelPair:
    (first_network, stage), *later_stages = stages.items()
    pair = stage.load_models(dtype, {"teacher": caches[first_network]} if first_network in caches else {})
    teachers, parents, vocabulary = {first_network: pair.teacher}, [*pair.parents], pair.vocabulary
    for network, stage in later_stages:
        teacher = stage.load_teacher(caches.get(network))
        if teacher is None:
            external_teacher = ExternalTeacher.from_cache_or_server(
                stage.single_teacher, caches.get(network), pair.origin.tokenizer, top_k=stage.top_k
            )
            teachers[network], shared_vocabulary, teacher_parent = (
                external_teacher,
                external_teacher.vocabulary,
                external_teacher.parent,
            )
        else:
            teachers[network], shared_vocabulary = teacher, count_shared_ids(teacher.tokenizer, pair.origin.tokenizer)
            teacher_parent = make_parent("teacher", teacher)
        vocabulary, parents = min(vocabulary, shared_vocabulary), [*parents, teacher_parent]
    return pair._replace(ensemble_teachers=teachers, vocabulary=vocabulary, parents=parents)


def get_loaded_teachers(pair: ModelPair) -> list[tuple[str, LoadedModel | None]]:
    """The teachers that are here and read what the student reads, by name; if none does, None for one that is not."""
    loaded = [
        (name, teacher)
        for name, teacher in pair.teachers.items()
        if isinstance(teacher, LoadedModel) and not pair.is_cross_tokenizer
    ]
    return [*loaded] or [("teacher", None)]


def label_check(network: str, check: Mapping[str, str]) -> dict[str, str]:
    """A check of a pair as a card keeps it: of one teacher of several, under a name that says of which."""
    name = network.removeprefix("teacher").strip()
    return {**check, "name": f"{check['name']} ({name})"} if name else dict(check)


def check_confidence_caches(ensemble: EnsembleConfig, caches: Mapping[str, TeacherCache]) -> None:
    """Refuse caches of drawn tokens where confidence weighs: they do not say how likely the text itself is.

    Raises: UsageError.
    """
    sampled_folders = [cache.folder for cache in caches.values() if cache.manifest.is_sampled]
    if ensemble.combination == "confidence" and sampled_folders:
        raise UsageError(
            f"the cache {sampled_folders[0]} holds drawn tokens, which do not say how sure its teacher is of "
            f"the text; capture "
            f"--top-k, or give --combine average"
        )


def check_single_teacher(teacher: str | tuple[str, ...] | None, caller: str) -> str | None:
    """The one teacher of something that knows no more.

    Raises: UsageError.
    """
    if isinstance(teacher, tuple):
        raise UsageError(f"{caller} knows one teacher, and {len(teacher)} are given; give one of them at a time")
    return teacher
