"""The folder of an arena: one training run for each arm and seed, and whether it is new, unfinished or finished."""

import contextlib
import gc
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from potstill.core.atomic_files import ARENA_FILE, CARD_FILE, TRAINING_FOLDER
from potstill.core.card import read_card
from potstill.core.device import resolve_device
from potstill.core.errors import ArtifactError, Interrupted
from potstill.core.memory import reset_peak_memory, trim_memory
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.run_folder import has_checkpoint
from potstill.stages.run_record import find_changed_options, refuse_changes
from potstill.stages.sequence import is_finished

README_FILE, CHART_FILE = "README.md", "arena.png"
EXTENSIBLE_FIELDS = ("objectives", "seeds", "prompts")  # a resumed arena may change these


class ArenaRun(NamedTuple):
    """One arm with one seed: the folder of its student, and the options that train it."""

    arm: str
    seed: int
    folder: Path
    stage: DistillConfig


def train_run(arena_run: ArenaRun, *, show: bool) -> None:
    """Train one arm with one seed, unless its folder is finished; an unfinished run continues.

    Raises: ArtifactError where the folder holds another run; the errors of `distill`.
    """
    if is_finished(arena_run.folder, arena_run.stage):
        return
    if (arena_run.folder / CARD_FILE).is_file() and not (arena_run.folder / TRAINING_FOLDER).is_dir():
        raise ArtifactError(
            f"{arena_run.folder} contains a student of another arena; remove it, or choose another --out"
        )
    can_resume = has_checkpoint(arena_run.folder)
    distill(arena_run.stage, arena_run.folder, resume=can_resume, overwrite=not can_resume, show=show)
    free_memory(arena_run.stage.device)


def check_same_origins(runs: Sequence[ArenaRun]) -> None:
    """Refuse to compare students whose models or data changed between two runs.

    Raises: ArtifactError.
    """
    first, *following = ((arena_run, _read_origins(arena_run.folder)) for arena_run in runs)
    for arena_run, origins in following:
        if origins != first[1]:
            raise ArtifactError(
                f"{arena_run.folder} and {first[0].folder} were not made from the same models and text, which "
                f"have changed "
                f"in between; run again with --overwrite"
            )


def _read_origins(folder: Path) -> list[Any]:
    card = read_card(folder)
    return [[parent["digest"] for parent in card["parents"]], card["data"]["text_digest"]]


def read_arena_state(out: Path, stage: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of the arena in `out`, whose options equal `stage` but for arms, seeds and prompts.

    Raises: UsageError, ArtifactError.
    """
    try:
        contents = json.loads((out / ARENA_FILE).read_text(encoding="utf-8"))
        state, saved_stage = dict(contents["settled"]), dict(contents["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{out / ARENA_FILE} cannot be read ({error}); choose another --out to begin anew, or discard the arena "
            f"with --overwrite"
        ) from error
    refuse_changes(f"the arena in {out}", find_changed_options(saved_stage, stage, skip=EXTENSIBLE_FIELDS))
    return state


def clear_arena_folder(out: Path) -> None:
    """Remove only the files of an arena from its folder."""
    for child in out.iterdir() if out.is_dir() else ():
        if child.is_dir() and ((child / CARD_FILE).is_file() or (child / TRAINING_FOLDER).is_dir()):
            shutil.rmtree(child)
        elif child.name in (ARENA_FILE, README_FILE, CHART_FILE):
            child.unlink()


def free_memory(device: str) -> None:
    """Free the memory of the last arm, so that the next peak does not include it."""
    gc.collect()
    trim_memory()
    resolved_device = resolve_device(device)
    if resolved_device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(resolved_device)


@contextlib.contextmanager
def explain_arena_interrupt(out: Path) -> Iterator[None]:
    """Replace an interrupt by an error that says how to continue the arena.

    Raises: Interrupted for KeyboardInterrupt.
    """
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as interrupt:
        num_finished = len(
            [card for card in out.glob(f"*-seed*/{CARD_FILE}") if not (card.parent / TRAINING_FOLDER).is_dir()]
        )
        raise Interrupted(f"stopped; {num_finished} arms are finished in {out}; continue with --resume") from interrupt
