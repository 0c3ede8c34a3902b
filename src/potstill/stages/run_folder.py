"""An output folder from the first check to the end of its run.

A stage reserves `out` before it opens a model, and works in `out`/training until `out` is complete; --resume continues
from there.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import (
    CARD_FILE,
    TRAINING_FOLDER,
    check_output_free,
    check_output_writable,
    contains_any,
    recover_folder,
    remove_leftovers,
)
from potstill.core.errors import ArtifactError, Interrupted, OutputExists, UsageError
from potstill.core.output_lock import output_lock
from potstill.stages.console import print_note
from potstill.stages.option_checks import check_output_not_input
from potstill.stages.preflight import StageInputs
from potstill.stages.run_record import RunRecord, check_same_options
from potstill.train import distributed


def contains_checkpoint(folder: Path) -> bool:
    """Whether a training folder holds a checkpoint."""
    return any(folder.glob("checkpoint-*"))


def has_checkpoint(out: Path) -> bool:
    """Whether `out`/training holds a checkpoint to resume from."""
    return contains_checkpoint(out / TRAINING_FOLDER)


@contextlib.contextmanager
def reserve_output(
    out: Path,
    inputs: StageInputs,
    *,
    overwrite: bool = False,
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
    resumable: Sequence[str] = (TRAINING_FOLDER,),
    recover: Callable[[Path], None] = recover_folder,
) -> Iterator[None]:
    """Checks all that a stage can know before it opens a model, and keeps `out` for this process during the block.

    The order is: options, packages, files that are read, permissions and room of `out`, its lock, its content.
    `options` are those of the stage, compared with those of a run that is resumed. A folder can be resumed if it holds
    one of `resumable`. `recover` mends what a killed process left. Under torchrun only the main process does this; the
    others wait.

    Raises: UsageError, MissingDependency, NotFound, DataError, ArtifactError, OutputInUse, OutputExists; before
        anything is written.
    """
    if not distributed.is_main_process():
        distributed.barrier()
        yield
        return
    if resume and overwrite:
        raise UsageError("--resume continues the run in the folder and --overwrite discards it; give one of them")
    inputs.check()
    check_output_not_input(out, *inputs.names)
    check_output_writable(out)
    inputs.check_room(out)
    with output_lock(out):
        recover(out)
        if resume:
            check_resumable(out, resumable)
            check_same_options(out, options or {})
        check_output_free(out, overwrite=overwrite or resume)
        distributed.barrier()
        yield


def check_resumable(out: Path, resumable: Sequence[str]) -> None:
    """Refuse to resume where nothing is unfinished; an empty folder is noted, and its run begins at the start.

    Raises: OutputExists.
    """
    if not out.is_dir() or not any(out.iterdir()):
        print_note(f"{out} holds no run, so there is nothing to resume; the run begins at its start")
    elif not contains_any(out, resumable):
        state = "a finished run" if (out / CARD_FILE).is_file() else "no run of potstill"
        raise OutputExists(f"{out} holds {state}, so there is nothing to resume; choose another --out")


@contextlib.contextmanager
def explain_interrupt(
    out: Path,
    *,
    saved: str = "what was trained",
    rest: str = "continues from there",
    is_resumable: Callable[[Path], bool] = contains_checkpoint,
) -> Iterator[None]:
    """Replaces Ctrl-C by an error that says what is saved and what --resume does with it.

    Raises: Interrupted for KeyboardInterrupt, if `is_resumable` holds for `out`/training.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not is_resumable(out / TRAINING_FOLDER):
            raise
        raise Interrupted(f"stopped; {saved} is saved in {out}, and --resume {rest}") from None


@contextlib.contextmanager
def training_folder(
    out: Path,
    record: RunRecord,
    *,
    overwrite: bool = False,
    is_resumable: Callable[[Path], bool] = contains_checkpoint,
) -> Iterator[Path]:
    """`out`/training, emptied first with `overwrite`, and with remainders of killed processes removed.

    The first run writes its record there, and later runs need the same origins. The folder is removed again if the run
    ends before `is_resumable` holds for it. Under torchrun only the main process writes; the others wait for it.

    Raises: UsageError for other origins; ArtifactError for a run without a record.
    """
    folder = out / TRAINING_FOLDER
    if not distributed.is_main_process():
        distributed.barrier()
        yield folder
        return
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    try:
        saved = RunRecord.from_folder(folder)
        if not is_resumable(folder):
            record.write(folder)
        elif saved is None:
            raise ArtifactError(f"{out} does not say what its run was begun with; choose another --out to begin anew")
        else:
            record.check_same_origins(out, saved)
        distributed.barrier()
        yield folder
    finally:
        if folder.exists() and not is_resumable(folder):
            shutil.rmtree(folder, ignore_errors=True)
