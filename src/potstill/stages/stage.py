"""A stage as plain data: for cards, `--dry-run`, `--config`, and to compare two runs."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from potstill.core.card import Parent
from potstill.models.lineage import find_hub_id, read_languages
from potstill.models.load import LoadedModel

RESULT_NEUTRAL_OPTIONS = (  # they change no result, or no more of it than its rounding
    *("skip_doctor", "compile", "checkpoint_activations", "micro_tokens", "shard"),
    *("save_every", "keep_checkpoints", "save_dtype", "report_to", "allow_pickle", "trust_remote_code"),
)


def to_plain_dict(stage: Any) -> dict[str, Any]:
    """The options of a stage with its kind, as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps({"stage": stage.kind, **asdict(stage)}))
    return plain


def reproducible_options(stage: Mapping[str, Any]) -> dict[str, Any]:
    """`stage` without the options that change no result: a resumed run has to agree on the rest."""
    return {
        name: reproducible_options(value) if isinstance(value, Mapping) else value
        for name, value in stage.items()
        if name not in RESULT_NEUTRAL_OPTIONS
    }


def make_parent(role: str, loaded: LoadedModel, *, name: str | None = None) -> Parent:
    """The entry of a card for a model that the stage read, under its own name or another."""
    return Parent(
        role=role,
        name=name or loaded.name,
        digest=loaded.digest,
        licence=loaded.license,
        note=loaded.note,
        hub_id=find_hub_id(loaded.name, loaded.path),
        languages=read_languages(loaded.name, loaded.path),
    )
