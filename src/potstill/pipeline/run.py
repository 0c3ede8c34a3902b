"""Stages one after another, each in a folder of its own; what was made from what stands in the cards."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.artefact import CARD, TRAINING, read_card, require_free
from potstill.core.errors import UsageError
from potstill.core.types import Measure
from potstill.pipeline.answers import Answers
from potstill.pipeline.distill import Distill
from potstill.pipeline.prune import Prune
from potstill.pipeline.stage import essence

Stage = Prune | Answers | Distill
PREVIOUS = "@previous"  # in a recipe: the folder that the stage before made


@dataclasses.dataclass(frozen=True)
class Finished:
    """What the last stage left on disk: its folder and its card."""

    out: Path
    card: Mapping[str, Any]

    @property
    def measures(self) -> dict[str, list[Measure]]:
        """The measures of the card by model, as they stand in `Run`."""
        return {name: [Measure(**m) for m in found] for name, found in self.card["measures"].items()}

    def to_dict(self) -> dict[str, Any]:
        """The folder and its card, for JSON."""
        return {"out": str(self.out), **self.card}


def run_stages(stages: Sequence[Stage], out: Path, *, overwrite: bool = False, resume: bool = False) -> Finished:
    """Runs `stages` into `out`/1-prune, `out`/2-distill, ...; with `resume`, finished ones are not made again.

    Raises: UsageError if there is no stage; OutputExists; what the stages raise.
    """
    if not stages:
        raise UsageError("a recipe without stages does nothing")
    require_free(out, overwrite=overwrite or resume)
    previous, unchanged = out, resume
    for number, stage in enumerate(stages, 1):
        folder = out / f"{number}-{stage.kind}"
        placed = placed_after(stage, str(previous))
        unchanged = unchanged and is_finished(folder, placed)
        if not unchanged:
            placed.run(folder, overwrite=overwrite, resume=resume and folder.exists())
        previous = folder
    return Finished(previous, read_card(previous))


def is_finished(folder: Path, stage: Stage) -> bool:
    """Whether `folder` holds what exactly this stage makes, and no run that was begun there since."""
    if not (folder / CARD).is_file() or (folder / TRAINING).is_dir():
        return False
    said = read_card(folder).get("stage", {})
    return essence(said) == essence(_known_to(said, stage, stage.to_dict()))


def _known_to(said: Mapping[str, Any], value: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as plain data, without options at their default that a card does not name: it is older than they are."""
    defaults = {f.name: f.default for f in dataclasses.fields(value)}
    younger = {name for name in defaults.keys() - said.keys() if getattr(value, name) == defaults[name]}
    kept = {name: part for name, part in plain.items() if name not in younger}
    for name, part in kept.items():
        if dataclasses.is_dataclass(own := getattr(value, name, None)) and isinstance(said.get(name), Mapping):
            kept[name] = _known_to(said[name], own, part)
    return kept


def placed_after(stage: Stage, previous: str) -> Stage:
    """`stage` with every `PREVIOUS` replaced by the folder that the stage before made."""
    named: dict[str, Any] = {f.name: previous for f in dataclasses.fields(stage) if getattr(stage, f.name) == PREVIOUS}
    return dataclasses.replace(stage, **named)
