"""Where a run works until its folder is whole: `out`/training, with what --resume needs."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from potstill.core.atomic_files import TRAINING_FOLDER, remove_leftovers, write_text
from potstill.core.device import get_dtype_name
from potstill.core.errors import Interrupted
from potstill.train import distributed

DTYPE_FILE = "dtype.txt"  # what `auto` chose when the run began


@contextlib.contextmanager
def explain_interrupt(out: Path) -> Iterator[None]:
    """Says that what was trained is safe, and how it goes on.

    Raises: Interrupted for KeyboardInterrupt, if there is a checkpoint in `out`.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not has_checkpoint(out):
            raise
        raise Interrupted(f"stopped; what was trained is saved in {out}, and --resume continues from there") from None


def has_checkpoint(out: Path) -> bool:
    """Whether there is anything to resume in `out`."""
    return any((out / TRAINING_FOLDER).glob("checkpoint-*"))


@contextlib.contextmanager
def training_folder(out: Path, *, overwrite: bool, dtype: torch.dtype) -> Iterator[Path]:
    """`out`/training; removed again if the run ended before there was anything to resume."""
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
        if not (folder / DTYPE_FILE).exists():
            write_text(folder / DTYPE_FILE, get_dtype_name(dtype))
        distributed.barrier()
        yield folder
    finally:
        if not has_checkpoint(out):
            shutil.rmtree(folder, ignore_errors=True)
