"""A stage: a value that makes a folder with a card. What would go back and forth between floors is a stage."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from potstill.core.card import Parent
from potstill.models.load import LoadedModel

RESULT_NEUTRAL_OPTIONS = (
    "skip_doctor",
    "compile",
    "checkpoint_activations",
)  # options of a stage that change no result


def to_plain_dict(stage: Any) -> dict[str, Any]:
    """A stage as plain data under its kind, as JSON gives it back: for cards, `--dry-run` and `--config`."""
    plain: dict[str, Any] = json.loads(json.dumps({"stage": stage.kind, **asdict(stage)}))
    return plain


def reproducible_options(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage as plain data, with what changes no result left off: what a run that is resumed has to agree in."""
    plain = {
        name: reproducible_options(value) if isinstance(value, Mapping) else value for name, value in stage.items()
    }
    return {name: False if name in RESULT_NEUTRAL_OPTIONS else value for name, value in plain.items()}


def make_parent(role: str, loaded: LoadedModel) -> Parent:
    """What a card says of a model that was read."""
    return Parent(role=role, name=loaded.name, digest=loaded.digest, licence=loaded.license, note=loaded.note)
