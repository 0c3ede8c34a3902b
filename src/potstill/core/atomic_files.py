"""Writes files and folders that appear complete or not at all, even if the process is killed."""

import contextlib
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from potstill.core.errors import ArtifactError, OutputExists

CARD_FILE = "card.json"

TRAINING_FOLDER = "training"  # in the output folder until the run is finished
ARENA_FILE = "arena.json"  # in the folder of an arena from the start
OUTPUT_MARKERS = (
    CARD_FILE,
    TRAINING_FOLDER,
    ARENA_FILE,
    f"*/{CARD_FILE}",
    f"*/{TRAINING_FOLDER}",
)  # every output folder of potstill holds one of these


def check_output_free(out: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder that is not empty or cannot be written.

    Raises: OutputExists, ArtifactError.
    """
    if out.is_file():
        raise OutputExists(f"{out} is a file; give a folder that does not exist yet")
    if out.is_mount():
        raise ArtifactError(f"{out} is a mount point, which cannot be replaced as a whole; choose a folder inside it")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputExists(f"{out} is not empty; pass --overwrite to replace it, or --resume to continue its run")
    if (
        out.is_dir()
        and overwrite
        and any(out.iterdir())
        and not any(next(out.glob(marker), None) for marker in OUTPUT_MARKERS)
    ):
        raise OutputExists(f"{out} holds files that potstill did not make, so it is not replaced; choose another --out")
    existing_folder = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(existing_folder, os.W_OK | os.X_OK):
        raise ArtifactError(f"no permission to write in {existing_folder}; choose another --out")


@contextlib.contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder next to `out` that becomes `out` at the end of the block, and is deleted after an error.

    If `out` is a symbolic link, the folder is made at its target, which may be on another disk.

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
        replace_folder(staging, out)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ArtifactError(f"writing {out} failed: {reason}; nothing was written") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; a folder that was at `out` is deleted only after the new one is in place."""
    out = out.resolve()
    backup = _staging_path(out, "old")
    if out.exists():
        out.rename(backup)
    try:
        folder.rename(out)
    except OSError:
        if backup.exists():
            backup.rename(out)
        raise
    _sync_directory_entry(out.parent)
    shutil.rmtree(backup, ignore_errors=True)


def recover_folder(out: Path) -> None:
    """Clean up next to `out` after a process that was killed.

    A folder that was being replaced returns to `out`, unless `out` exists; incomplete folders are deleted.
    Only one process at a time may write `out`.
    """
    out = out.resolve()
    leftovers = [path for kind in ("old", "partial") for path in out.parent.glob(_staging_pattern(out, kind))]
    if not out.exists() and (backup := next((leftover for leftover in leftovers if leftover.suffix == ".old"), None)):
        backup.rename(out)
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


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
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_directory_entry(folder: Path) -> None:
    """Sync the folder itself, without which a rename is not on the disk; some file systems cannot and need not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
