"""The teachers of a distillation, as the options name them: one, or several that teach together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from potstill.core.errors import UsageError
from potstill.data.row_reader import Route
from potstill.objectives.multi_teacher import COMBINATIONS, Combination, TeacherEnsemble
from potstill.teachers.cached import is_cache
from potstill.teachers.http_client import is_address

# A name never holds what an address or a path has before its first "=".
NAMED_TEACHER = re.compile(r"([^/\\:=]+)=(.+)")
# Under a route every teacher has a name, which is a value of the column.
ROUTED_TEACHER = re.compile(r"([^=]+)=(.+)")
AVERAGE, ROUTE = "average", "route"


@dataclass(frozen=True)
class TeacherSource:
    """One teacher: the name of its network in the run, and where its signals come from.

    `location` is a hub id, a folder, a `.gguf` file or the address of a server; `cache` is the folder of its cache. A
    teacher with both learns from the cache, and the model measures. A server is asked for `top_k` tokens a position.
    """

    network: str
    location: str | None
    cache: str | None
    top_k: int

    @property
    def kind(self) -> Literal["local", "served", "cached"]:
        """Where the teacher's weights are: here, behind a server, or nowhere (a cache alone)."""
        if self.location is None:
            return "cached"
        return "served" if is_address(self.location) else "local"


@dataclass(frozen=True)
class TeacherOptions:
    """What `--teacher`, `--combine`, `--teacher-cache` and `--top-k` say together.

    `ensemble` says how several teachers teach together; one teacher needs none. `route` is the column of the data that
    names the teacher of each document.
    """

    sources: tuple[TeacherSource, ...]
    ensemble: TeacherEnsemble | None = None
    route: Route | None = None

    @classmethod
    def parse(
        cls, teacher: str | tuple[str, ...] | None, combine: str, *, cache: str | None, top_k: int
    ) -> "TeacherOptions":
        """One teacher (with or without a cache), or several as `NAME=TEACHER` or `TEACHER`.

        Raises: UsageError for a combination or a name that does not fit.
        """
        if isinstance(teacher, tuple):
            return cls._parse_ensemble(teacher, combine, top_k=top_k)
        if combine != AVERAGE:
            raise UsageError(f"--combine {combine} is for several teachers; give --teacher more than once")
        return cls((TeacherSource("teacher", teacher, cache, top_k),))

    @classmethod
    def _parse_ensemble(cls, teachers: Sequence[str], combine: str, *, top_k: int) -> "TeacherOptions":
        combination, _, column = combine.partition(":")
        if combination not in COMBINATIONS or (combination == ROUTE) != bool(column):
            raise UsageError(f"--combine {combine!r} is none of average, confidence and route:COLUMN")
        named_locations = _split_names(teachers, column)
        names = [name for name, _ in named_locations]
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise UsageError(
                f"two teachers are called {duplicates[0]!r}; name them, as in --teacher one={named_locations[0][1]}"
            )
        ensemble = TeacherEnsemble(tuple(names), cast(Combination, combination))
        sources = (
            TeacherSource(network, None, location, top_k)
            if is_cache(Path(location).expanduser())
            else TeacherSource(network, location, None, top_k)
            for network, (_, location) in zip(ensemble.networks, named_locations, strict=True)
        )
        return cls(tuple(sources), ensemble, Route(column, tuple(names)) if column else None)


def _split_names(teachers: Sequence[str], column: str) -> list[tuple[str, str]]:
    """(name, location) of each teacher; `column` is that of a route, where every teacher needs a name."""
    pattern = ROUTED_TEACHER if column else NAMED_TEACHER
    pairs = [match.groups() if (match := pattern.fullmatch(option)) else ("", option) for option in teachers]
    if column and (unnamed := [location for name, location in pairs if not name]):
        raise UsageError(
            f"--combine route:{column} needs the value of {column!r} that each teacher is for; give --teacher "
            f"VALUE={unnamed[0]}"
        )
    return [(name or _get_default_name(location), location) for name, location in pairs]


def _get_default_name(location: str) -> str:
    """The name of a teacher without one: a folder's last part, or a server's model or address."""
    if is_address(location):
        return location.partition("#")[2] or location
    return Path(location).name or location
