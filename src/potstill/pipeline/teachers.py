"""Several teachers of one student: what each is (a model here, a server, a cache), and how they teach together."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.data.cache import Cache, is_cache
from potstill.data.rows import Route
from potstill.data.served import TOP_K
from potstill.data.wire import is_address
from potstill.models.load import Loaded
from potstill.models.vocabulary import shared_ids
from potstill.objectives.several import COMBINATIONS, Combination, Panel
from potstill.pipeline.absent import Absent
from potstill.pipeline.pair import Pair
from potstill.pipeline.stage import parent
from potstill.train.policy import MINILLM

if TYPE_CHECKING:
    from potstill.pipeline.distill import Distill

NAMED = re.compile(r"([^/\\:=]+)=(.+)")  # no address and no path of several parts has a = before its first / or :
VALUED = re.compile(r"([^=]+)=(.+)")  # under a route every teacher is named, by whatever stands in the column
AVERAGE, ROUTE = "average", "route"


class Several(NamedTuple):
    """Teachers by name, how they are combined, and of a route the column of the data that names one."""

    sources: Mapping[str, str]
    combination: Combination
    column: str = ""

    @classmethod
    def of(cls, teachers: Sequence[str], combine: str) -> "Several":
        """`NAME=TEACHER` or `TEACHER` each, and `average`, `confidence` or `route:COLUMN`.

        Raises: UsageError.
        """
        combination, _, column = combine.partition(":")
        if combination not in COMBINATIONS or (combination == ROUTE) != bool(column):
            raise UsageError(f"--combine {combine!r} is none of average, confidence and route:COLUMN")
        pattern = VALUED if combination == ROUTE else NAMED
        named = [hit.groups() if (hit := pattern.fullmatch(one)) else ("", one) for one in teachers]
        if combination == ROUTE and (unnamed := [source for name, source in named if not name]):
            raise UsageError(
                f"--combine {combine} needs the value of {column!r} that each teacher is for; give --teacher "
                f"VALUE={unnamed[0]}"
            )
        names = [name or _called(source) for name, source in named]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"two teachers are called {twice[0]!r}; name them, as in --teacher one={named[0][1]}")
        sources = dict(zip(names, (source for _, source in named), strict=True))
        return cls(sources, cast(Combination, combination), column)

    @property
    def panel(self) -> Panel:
        """What the objective has to know."""
        return Panel(tuple(self.sources), self.combination)

    @property
    def route(self) -> Route | None:
        """What the reader of the data has to know."""
        return Route(self.column, tuple(self.sources)) if self.column else None


def _called(source: str) -> str:
    """How a teacher without a name is called: a folder's last part, a server's model or else its address."""
    if is_address(source):
        return source.partition("#")[2] or source
    return Path(source).name or source


def alone(stage: "Distill", several: Several) -> "dict[str, Distill]":
    """For each teacher, by its name as a network, the stage in which it alone teaches; building it refuses a wrong one.

    Raises: UsageError where several cannot teach together what is asked.
    """
    _require_combinable(stage, several)
    first, *_ = several.sources.values()
    begun = {"student": stage.student, "keep": stage.keep, "params": stage.params}
    learns = {"student": stage.student or first, "keep": None, "params": None}
    found: dict[str, Distill] = {}
    for source, network in zip(several.sources.values(), several.panel.networks, strict=True):
        cached = is_cache(Path(source).expanduser())
        own = {"teacher": None, "teacher_cache": source} if cached else {"teacher": source}
        size = learns if found else begun
        asked = {} if is_address(source) else {"top_k": TOP_K}
        found[network] = replace(stage, combine=AVERAGE, **{**own, **size, **asked})  # type: ignore[arg-type]
    return found


def _require_combinable(stage: "Distill", several: Several) -> None:
    objective, policy = stage.objective, stage.policy
    if objective.alive:
        raise UsageError(
            f"{objective.name} learns from the hidden states or the tables of one teacher; with several, choose a "
            f"divergence, such as --objective forward_kl"
        )
    if not objective.teaches:
        raise UsageError("cross_entropy asks no teacher, and one is enough to measure beside; give --teacher once")
    if stage.teacher_cache is not None:
        raise UsageError("with several teachers a cache is one of them; give --teacher CACHE, not --teacher-cache")
    if policy.writes and policy.name == MINILLM:
        raise UsageError("--rollout minillm samples with one teacher; give one, or --rollout gkd")


def pair_of(stages: "Mapping[str, Distill]", caches: Mapping[str, Cache], dtype: torch.dtype) -> Pair:
    """The student with all its teachers, each checked as if it taught alone; the first is measured beside.

    Raises: VocabularyMismatch for a teacher with other tokens than the student's, and what a stage with one does.
    """
    try:
        return _joined(stages, caches, dtype)
    except VocabularyMismatch as error:
        found = str(error).partition(";")[0]  # the way out that one teacher has is none for several
        raise VocabularyMismatch(f"{found}; of several teachers each needs the student's tokenizer") from error


def _joined(stages: "Mapping[str, Distill]", caches: Mapping[str, Cache], dtype: torch.dtype) -> Pair:
    (first, stage), *others = stages.items()
    pair = stage.pair(dtype, {"teacher": caches[first]} if first in caches else {})
    found, parents, vocabulary = {first: pair.teacher}, [*pair.parents], pair.vocabulary
    for network, stage in others:
        one = stage.live(caches.get(network))
        if one is None:
            away = Absent.of(stage.sole, caches.get(network), pair.origin.tokenizer, top_k=stage.top_k)
            found[network], shared, said = away, away.vocabulary, away.parent
        else:
            found[network], shared = one, shared_ids(one.tokenizer, pair.origin.tokenizer)
            said = parent("teacher", one)
        vocabulary, parents = min(vocabulary, shared), [*parents, said]
    return pair._replace(several=found, vocabulary=vocabulary, parents=parents)


def live_teachers(pair: Pair) -> list[tuple[str, Loaded | None]]:
    """The teachers that are here and read what the student reads, by name; if none does, None for one that is not."""
    here = [(name, one) for name, one in pair.teachers.items() if isinstance(one, Loaded) and not pair.across]
    return [*here] or [("teacher", None)]


def of_teacher(network: str, check: Mapping[str, str]) -> dict[str, str]:
    """A check of a pair as a card keeps it: of one teacher of several, under a name that says of which."""
    name = network.removeprefix("teacher").strip()
    return {**check, "name": f"{check['name']} ({name})"} if name else dict(check)


def require_sure(several: Several, caches: Mapping[str, Cache]) -> None:
    """Refuse caches of drawn tokens where confidence weighs: they do not say how likely the text itself is.

    Raises: UsageError.
    """
    drawn = [cache.folder for cache in caches.values() if cache.manifest.drawn]
    if several.combination == "confidence" and drawn:
        raise UsageError(
            f"the cache {drawn[0]} holds drawn tokens, which do not say how sure its teacher is of the text; capture "
            f"--top-k, or give --combine average"
        )


def require_one(teacher: str | tuple[str, ...] | None, what: str) -> str | None:
    """The one teacher of something that knows no more.

    Raises: UsageError.
    """
    if isinstance(teacher, tuple):
        raise UsageError(f"{what} knows one teacher, and {len(teacher)} are given; give one of them at a time")
    return teacher
