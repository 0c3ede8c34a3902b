"""`card.json` of an output folder: the stage that made it, its parents, its data and its measures."""

import contextlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import CARD_FILE, write_text
from potstill.core.errors import ArtifactError
from potstill.core.measure import Measure

PACKAGES = ("potstill", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft")
BEFORE_TRAINING = "before training"  # the name of these measures in a card
MISSING_MEASURES = {  # the failures of a card whose measures are not made yet
    "measures and samples": "the run has not come to them yet, or was stopped there; --resume makes them"
}


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A model from which another one was made: its name, the SHA-256 of its weights, and its license if known.

    `hub_id` is its id on the hub, or that of the model which a folder was made from. `languages` are those of its card.
    """

    role: str
    name: str
    digest: str | None
    licence: str | None = None
    note: str = ""
    hub_id: str = ""
    languages: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Card:
    """The record of a finished stage, complete enough to trace a model and to reproduce it.

    `stage` has the stage's options, `data` the source of the text, and `cost` the seconds, tokens and memory.
    `invariants` has the checks with their outcomes, and `details` the stage's own results (kept layers, importance).
    `failures` names what could not be made for the card, with the error.
    """

    stage: Mapping[str, Any]
    seed: int
    parents: Sequence[Parent] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Sequence[Measure]] = field(default_factory=dict)
    invariants: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    command: str = field(default_factory=lambda: " ".join(["potstill", *sys.argv[1:]]))
    versions: Mapping[str, str] = field(default_factory=lambda: get_package_versions())

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        plain = asdict(self)
        plain["measures"] = {
            name: [measure.to_dict() for measure in measures] for name, measures in self.measures.items()
        }
        return plain

    def write(self, folder: Path) -> None:
        """Write `card.json` into the folder, completely or not at all."""
        write_text(folder / CARD_FILE, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a folder as plain data.

    Raises: ArtifactError if there is no card or it is not JSON.
    """
    try:
        card: dict[str, Any] = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} has no {CARD_FILE}; give a folder that potstill has finished") from error
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{folder / CARD_FILE} cannot be read ({error}); make the folder again") from error
    return card


def get_package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect a result."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
