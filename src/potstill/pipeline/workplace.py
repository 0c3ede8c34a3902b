"""Where a run works until its folder is whole: `out`/training, with what --resume needs."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from potstill.core import backend
from potstill.core.artefact import TRAINING, clear, write_text
from potstill.core.errors import Interrupted
from potstill.train import ranks

COMPUTE = "dtype.txt"  # what `auto` chose when the run began


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
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
    return any((out / TRAINING).glob("checkpoint-*"))


@contextlib.contextmanager
def workplace(out: Path, *, overwrite: bool, dtype: torch.dtype) -> Iterator[Path]:
    """`out`/training; removed again if the run ended before there was anything to resume."""
    folder = out / TRAINING
    if not ranks.first():
        ranks.wait()
        yield folder
        return
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    try:
        if not (folder / COMPUTE).exists():
            write_text(folder / COMPUTE, backend.name_of(dtype))
        ranks.wait()
        yield folder
    finally:
        if not has_checkpoint(out):
            shutil.rmtree(folder, ignore_errors=True)
