"""Writes files and folders that appear complete or not at all, even if the process is killed."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from potstill.core.errors import ArtifactError, OutputExists

CARD_FILE = "card.json"

TRAINING_FOLDER = "training"  # in the output folder until the run is finished
RECORD_FILE = "run.json"  # in the training folder: what the run was begun with
CARRY_FILE = ".carry"  # in a folder that replaces another: the name of a folder that moves over from the old one
ARENA_FILE = "arena.json"  # in the folder of an arena from the start
ADVICE_FILE = "advice.json"  # in the folder of an advice
EDITS_FILE = "edits.json"  # in a folder of edits of a model
OUTPUT_MARKERS = (
    CARD_FILE,
    TRAINING_FOLDER,
    ARENA_FILE,
    ADVICE_FILE,
    f"*/{CARD_FILE}",
    f"*/{TRAINING_FOLDER}",
)  # every output folder of potstill holds one of these
UNFINISHED_MARKERS = (TRAINING_FOLDER, f"*/{TRAINING_FOLDER}")


def check_output_writable(out: Path) -> None:
    """Refuse an output folder that is a file, a mount point, or without permission to write.

    Raises: OutputExists, ArtifactError.
    """
    if out.is_file():
        raise OutputExists(f"{out} is a file; give a folder that does not exist yet")
    if out.is_mount():
        raise ArtifactError(f"{out} is a mount point, which cannot be replaced as a whole; choose a folder inside it")
    existing_folder = find_existing_folder(out)
    if not os.access(existing_folder, os.W_OK | os.X_OK):
        raise ArtifactError(f"no permission to write in {existing_folder}; choose another --out")


def find_existing_folder(out: Path) -> Path:
    """`out`, or the nearest folder above it that exists."""
    return next(folder for folder in (out, *out.absolute().parents) if folder.exists())


def check_output_free(out: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder that is not empty or cannot be written.

    Raises: OutputExists, ArtifactError.
    """
    check_output_writable(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite and contains_any(out, UNFINISHED_MARKERS):
        raise OutputExists(f"{out} holds an unfinished run; pass --resume to continue it, or --overwrite to discard it")
    if not overwrite:
        raise OutputExists(f"{out} is not empty; choose another --out, or pass --overwrite to replace it")
    if not contains_any(out, OUTPUT_MARKERS):
        raise OutputExists(f"{out} holds files that potstill did not make, so it is not replaced; choose another --out")


def contains_any(out: Path, patterns: Sequence[str]) -> bool:
    """Whether a folder holds a file or a folder that one of the patterns names."""
    return any(next(out.glob(pattern), None) for pattern in patterns)


@contextlib.contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False, carry: str = "") -> Iterator[Path]:
    """A temporary folder next to `out` that becomes `out` at the end of the block, and is deleted after an error.

    If `out` is a symbolic link, the folder is made at its target, which may be on another disk. `carry` names a folder
    inside `out` that stays there.

    Raises: OutputExists if `out` is not empty; ArtifactError if the disk is full or not writable.
    """
    check_output_free(out, overwrite=overwrite)
    out = out.resolve()
    recover_folder(out)
    staging = _staging_path(out, "partial")
    try:
        staging.mkdir(parents=True)
        yield staging
        sync_folder(staging)
        replace_folder(staging, out, carry=carry)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ArtifactError(f"writing {out} failed: {reason}; nothing was written") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(folder: Path, out: Path, *, carry: str = "") -> None:
    """Rename `folder` to `out`; a folder that was at `out` is deleted only after the new one is in place.

    `carry` names a folder inside the old `out` that moves into the new one. `recover_folder` finishes that move after
    a kill.
    """
    out = out.resolve()
    backup = _staging_path(out, "old")
    if carry and (out / carry).exists():
        write_text(folder / CARRY_FILE, carry)
    if out.exists():
        out.rename(backup)
    try:
        folder.rename(out)
    except OSError:
        if backup.exists():
            backup.rename(out)
        raise
    _sync_directory_entry(out.parent)
    _finish_carrying(out, [backup])
    shutil.rmtree(backup, ignore_errors=True)


def remove_inner_folder(folder: Path) -> None:
    """Delete a folder inside an output folder at once: after a kill `recover_folder` deletes the rest."""
    out = folder.resolve().parent
    leftover = _staging_path(out, "partial")
    folder.rename(leftover)
    _sync_directory_entry(out)
    shutil.rmtree(leftover, ignore_errors=True)


def _finish_carrying(out: Path, backups: Sequence[Path]) -> None:
    """Move the folder that `out` carries over from one of `backups`, if it is not there yet."""
    marker = out / CARRY_FILE
    if not marker.is_file():
        return
    name = marker.read_text(encoding="utf-8")
    if source := next((backup / name for backup in backups if (backup / name).exists()), None):
        source.rename(out / name)
    marker.unlink()


def recover_folder(out: Path) -> None:
    """Clean up next to `out` after a process that was killed.

    A folder that was being replaced returns to `out`, unless `out` exists; incomplete folders are deleted.
    Only the process that holds the lock of `out` may call this (`core.output_lock`).
    """
    out = out.resolve()
    leftovers = [path for kind in ("old", "partial") for path in out.parent.glob(_staging_pattern(out, kind))]
    if not out.exists() and (backup := next((leftover for leftover in leftovers if leftover.suffix == ".old"), None)):
        backup.rename(out)
    _finish_carrying(out, leftovers)
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


def is_partial(path: str | Path) -> bool:
    """Whether a path is that of a folder or file that is not complete yet."""
    return Path(path).match(".*.partial")


def remove_leftovers(folder: Path) -> None:
    """Delete the incomplete files and folders that a killed process left in `folder`."""
    for leftover in (*folder.glob(".*.partial"), *folder.glob(".*.old")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextlib.contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A temporary file that is synced and becomes `file` at the end of the block, and is deleted after an error."""
    staging = _staging_path(file, "partial")
    try:
        yield staging
        staging.chmod(0o666 & ~_get_umask())  # safetensors lets only the owner read its files
        _sync_file(staging)
        staging.replace(file)
        _sync_directory_entry(file.absolute().parent)
    finally:
        staging.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with atomic_file(file) as staging:
        staging.write_text(text, encoding="utf-8")


def write_rows(file: Path, rows: Iterable[Any]) -> None:
    """Write rows as lines of JSON, whole or not at all; a value that JSON has no type for is written as text."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def sync_folder(folder: Path) -> None:
    """Sync every file below `folder` to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            _sync_file(file)


def hash_file(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _staging_path(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _staging_pattern(path: Path, kind: str) -> str:
    return f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.{kind}"


def _get_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_file(file: Path) -> None:
    with file.open("r+b" if os.name == "nt" else "rb") as stream:  # Windows syncs what is open for writing
        os.fsync(stream.fileno())


def _sync_directory_entry(folder: Path) -> None:
    """Sync the folder itself, without which a rename is not on the disk; some file systems cannot and need not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
