"""The folder `out`/training: a stage works in it until `out` is complete, and --resume continues from it."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from potstill.core.atomic_files import TRAINING_FOLDER, check_output_free, recover_folder, remove_leftovers, write_text
from potstill.core.errors import Interrupted, OutputExists, UsageError
from potstill.stages.option_checks import check_output_not_input
from potstill.train import distributed

DTYPE_FILE = "dtype.txt"  # the dtype that `auto` chose when the run began


def contains_checkpoint(folder: Path) -> bool:
    """Whether a training folder holds a checkpoint."""
    return any(folder.glob("checkpoint-*"))


def has_checkpoint(out: Path) -> bool:
    """Whether `out`/training holds a checkpoint to resume from."""
    return contains_checkpoint(out / TRAINING_FOLDER)


def check_output_folder(out: Path, *inputs: str | None, overwrite: bool, resume: bool) -> None:
    """Refuse an output folder that holds something else, or one of the `inputs`; mend what a killed run left.

    Raises: UsageError, OutputExists, ArtifactError.
    """
    if distributed.is_main_process():
        if resume and overwrite:
            raise UsageError("--resume continues the run in the folder and --overwrite discards it; give one of them")
        recover_folder(out)
        if resume and out.is_dir() and not (out / TRAINING_FOLDER).is_dir() and any(out.iterdir()):
            raise OutputExists(f"{out} holds no unfinished run, so there is nothing to resume")
        check_output_not_input(out, *inputs)
        check_output_free(out, overwrite=overwrite or resume)
    distributed.barrier()


@contextlib.contextmanager
def explain_interrupt(
    out: Path, *, saved: str = "what was trained", is_resumable: Callable[[Path], bool] = contains_checkpoint
) -> Iterator[None]:
    """Replaces Ctrl-C by an error that says what is saved and how to continue.

    Raises: Interrupted for KeyboardInterrupt, if `is_resumable` holds for `out`/training.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not is_resumable(out / TRAINING_FOLDER):
            raise
        raise Interrupted(f"stopped; {saved} is saved in {out}, and --resume continues from there") from None


@contextlib.contextmanager
def training_folder(
    out: Path,
    *,
    overwrite: bool,
    marker: tuple[str, str],
    is_resumable: Callable[[Path], bool] = contains_checkpoint,
) -> Iterator[Path]:
    """`out`/training, emptied first with `overwrite`, and with remainders of killed processes removed.

    `marker` is the name and text of a file that the first run writes there and later runs find. The folder is removed
    again if the run ends before `is_resumable` holds for it. Under torchrun only the main process writes; the others
    wait for it.
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
        name, text = marker
        if not (folder / name).exists():
            write_text(folder / name, text)
        distributed.barrier()
        yield folder
    finally:
        if folder.exists() and not is_resumable(folder):
            shutil.rmtree(folder, ignore_errors=True)
