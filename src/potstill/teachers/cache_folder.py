"""The folder of a cache while it is written: its progress file, and the move to its place once it is complete."""

import json
import shutil
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

from potstill.core.atomic_files import RECORD_FILE, hash_file, replace_folder, sync_folder, write_text
from potstill.core.errors import ArtifactError
from potstill.teachers.cached import MANIFEST, PROGRESS, Manifest


def read_progress(folder: Path) -> dict[str, str]:
    """The SHA-256 of each finished shard by its name, from the progress file; empty before the first shard.

    Raises: ArtifactError.
    """
    file = folder / PROGRESS
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["files"]) if file.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}); choose another --out to begin anew, or give --overwrite"
        ) from error


def write_progress(folder: Path, files: Mapping[str, str]) -> None:
    """Write the progress file."""
    write_text(folder / PROGRESS, json.dumps({"files": dict(files)}))


def has_finished_shard(folder: Path) -> bool:
    """Whether a training folder holds a finished shard."""
    return bool(read_progress(folder))


def drop_damaged_shards(folder: Path) -> None:
    """Forget the first missing or altered shard and all after it, so that they are written again.

    Raises: ArtifactError.
    """
    files = read_progress(folder)
    valid_files = dict(
        takewhile(
            lambda item: (folder / item[0]).is_file() and hash_file(folder / item[0]) == item[1],
            sorted(files.items()),
        )
    )
    if valid_files != files:
        write_progress(folder, valid_files)


def publish_cache(folder: Path, out: Path, manifest: Manifest) -> None:
    """Adds the manifest to a training folder inside `out`, and moves the folder to `out`."""
    write_text(folder / MANIFEST, json.dumps(manifest.to_dict(), indent=1))
    sync_folder(folder)
    shutil.rmtree(_staging_path(out), ignore_errors=True)
    folder.rename(_staging_path(out))
    _move_into_place(out)


def finish_interrupted_move(out: Path) -> None:
    """Moves a complete cache to an empty `out`, if its process was killed just before the last move."""
    if not (out.is_dir() and any(out.iterdir())):
        _move_into_place(out)


def _staging_path(out: Path) -> Path:
    return out.resolve().with_name(f".{out.resolve().name}.capture")


def _move_into_place(out: Path) -> None:
    if (_staging_path(out) / MANIFEST).is_file():
        for name in (PROGRESS, RECORD_FILE):
            (_staging_path(out) / name).unlink(missing_ok=True)
        replace_folder(_staging_path(out), out)
