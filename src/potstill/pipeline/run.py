"""Stages one after another, each in a folder of its own; what was made from what stands in the cards."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.core.artefact import CARD, read_card
from potstill.core.errors import UsageError
from potstill.pipeline.distill import Distill, Run
from potstill.pipeline.prune import Prune

PREVIOUS = "@previous"  # in a recipe: the folder that the stage before made


def run_stages(
    stages: Sequence[Prune | Distill], out: Path, *, overwrite: bool = False, resume: bool = False
) -> Run | Any:
    """Runs `stages` into `out`/1-prune, `out`/2-distill, ...; with `resume`, finished ones are not made again.

    Raises: UsageError if there is no stage; what the stages raise.
    """
    if not stages:
        raise UsageError("a recipe without stages does nothing")
    result, previous = None, ""
    for number, stage in enumerate(stages, 1):
        folder = out / f"{number}-{type(stage).__name__.lower()}"
        placed = placed_after(stage, previous)
        if not (resume and (folder / CARD).is_file() and read_card(folder)["stage"] == placed.to_dict()):
            result = placed.run(folder, overwrite=overwrite, resume=resume and folder.exists())
        previous = str(folder)
    return result if result is not None else read_card(Path(previous))


def placed_after(stage: Prune | Distill, previous: str) -> Prune | Distill:
    """`stage` with every `PREVIOUS` replaced by the folder that the stage before made."""
    named = {f.name: previous for f in dataclasses.fields(stage) if getattr(stage, f.name) == PREVIOUS}
    return dataclasses.replace(stage, **named)
