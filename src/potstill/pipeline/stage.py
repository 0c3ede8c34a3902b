"""A stage: a value that makes a folder with a card. What would go back and forth between floors is a stage."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from potstill.core.artefact import Card, Parent
from potstill.models.load import Loaded


class Stage(Protocol):
    """A frozen dataclass of plain values; running it writes `out` with `card.json`, whole or not at all."""

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> Card: ...
    def to_dict(self) -> dict[str, Any]: ...


def as_value(stage: Any) -> dict[str, Any]:
    """A stage as plain data under its name, for cards, `--dry-run` and `--config`."""
    return {"stage": type(stage).__name__.lower(), **asdict(stage)}


def parent(role: str, loaded: Loaded) -> Parent:
    """What a card says of a model that was read."""
    return Parent(role=role, name=loaded.name, digest=loaded.digest, licence=loaded.licence, note=loaded.note)
