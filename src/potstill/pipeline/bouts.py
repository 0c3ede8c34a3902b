"""The folder of an arena: one training for each arm and seed in it, begun, finished, continued, or of another arena."""

import contextlib
import gc
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from potstill.core import backend
from potstill.core.artefact import ARENA, CARD, TRAINING, read_card
from potstill.core.errors import ArtefactError, Interrupted, UsageError
from potstill.pipeline.distill import Distill
from potstill.pipeline.run import is_finished
from potstill.pipeline.stage import essence
from potstill.pipeline.workplace import has_checkpoint
from potstill.train.progress import forget_peak

PAGE, CHART = "README.md", "arena.png"
MAY_GROW = ("objectives", "seeds", "prompts")  # what an arena that is resumed may have otherwise


class Bout(NamedTuple):
    """One arm with one seed, the folder of the student that it makes, and how it is made."""

    arm: str
    seed: int
    folder: Path
    stage: Distill


def train(bout: Bout, *, show: bool) -> None:
    """One arm with one seed, unless its folder holds it already; begun ones go on.

    Raises: ArtefactError where the folder holds another training; what `Distill.run` raises.
    """
    if is_finished(bout.folder, bout.stage):
        return
    if (bout.folder / CARD).is_file() and not (bout.folder / TRAINING).is_dir():
        raise ArtefactError(f"{bout.folder} holds a student of another arena; remove it, or choose another --out")
    begun = has_checkpoint(bout.folder)
    bout.stage.run(bout.folder, resume=begun, overwrite=not begun, show=show)
    free_memory(bout.stage.device)


def require_alike(bouts: Sequence[Bout]) -> None:
    """Refuse to compare students whose models or texts had one name and were not the same.

    Raises: ArtefactError.
    """
    first, *others = ((bout, _origins(bout.folder)) for bout in bouts)
    for bout, origins in others:
        if origins != first[1]:
            raise ArtefactError(
                f"{bout.folder} and {first[0].folder} were not made from the same models and text, which have changed "
                f"in between; run again with --overwrite"
            )


def _origins(folder: Path) -> list[Any]:
    card = read_card(folder)
    return [[parent["digest"] for parent in card["parents"]], card["data"]["text_digest"]]


def settled_in(out: Path, stage: Mapping[str, Any]) -> dict[str, Any]:
    """What the arena in `out` settled when it began, if it is the same as `stage` but for arms and seeds.

    Raises: UsageError, ArtefactError.
    """
    try:
        begun = json.loads((out / ARENA).read_text(encoding="utf-8"))
        settled, then = dict(begun["settled"]), dict(begun["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{out / ARENA} cannot be read ({error}); start again with --overwrite") from error
    now = dict(_flat(essence(stage)))
    for name, value in _flat(essence(then)):
        if name not in MAY_GROW and now.get(name) != value:
            raise UsageError(
                f"the arena in {out} was begun with {name.split('.')[-1]} {value}, and now it is {now.get(name)}; give "
                f"what it was, or --overwrite"
            )
    return settled


def _flat(stage: Mapping[str, Any], *, within: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in stage.items():
        if isinstance(value, Mapping):
            yield from _flat(value, within=f"{within}{name}.")
        else:
            yield f"{within}{name}", value


def vacate(out: Path) -> None:
    """Removes what an arena made in its folder, and nothing else."""
    for child in out.iterdir() if out.is_dir() else ():
        if child.is_dir() and ((child / CARD).is_file() or (child / TRAINING).is_dir()):
            shutil.rmtree(child)
        elif child.name in (ARENA, PAGE, CHART):
            child.unlink()


def free_memory(device: str) -> None:
    """What the last arm held goes back, so that the next one's peak is its own."""
    gc.collect()
    backend.trim()
    kind = backend.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()
    forget_peak(kind)


@contextlib.contextmanager
def continuable(out: Path) -> Iterator[None]:
    """Says that an arena that was stopped goes on.

    Raises: Interrupted for KeyboardInterrupt.
    """
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as stopped:
        done = len([card for card in out.glob(f"*-seed*/{CARD}") if not (card.parent / TRAINING).is_dir()])
        raise Interrupted(f"stopped; {done} arms are finished in {out}, and --resume goes on") from stopped
