"""The folder of a cache while it is written: its progress file, and the move to its place once it is complete."""

import json
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import hash_file, replace_folder, sync_folder, write_text
from potstill.core.errors import ArtifactError
from potstill.teachers.cached import MANIFEST, PROGRESS, Manifest


def start_progress(identity: str) -> tuple[str, str]:
    """The name and the content of the progress file before the first shard."""
    return PROGRESS, json.dumps({"identity": identity, "files": {}})


def read_progress(folder: Path) -> dict[str, Any]:
    """The progress file: `identity` of the run, and `files`, the SHA-256 of each finished shard.

    Raises: ArtifactError.
    """
    try:
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        return {"identity": str(progress["identity"]), "files": dict(progress["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / PROGRESS} cannot be read ({error}); start again with --overwrite") from error


def has_finished_shard(folder: Path) -> bool:
    """Whether a training folder holds a finished shard."""
    return (folder / PROGRESS).is_file() and bool(read_progress(folder)["files"])


def check_progress(out: Path, folder: Path, identity: str) -> None:
    """Refuses to continue another cache, and drops the first missing or altered shard and all after it.

    Raises: ArtifactError.
    """
    progress = read_progress(folder)
    if progress["identity"] != identity:
        raise ArtifactError(f"{out} holds a cache of other settings, teacher or text; start again with --overwrite")
    valid_files = dict(
        takewhile(
            lambda item: (folder / item[0]).is_file() and hash_file(folder / item[0]) == item[1],
            sorted(progress["files"].items()),
        )
    )
    if valid_files != progress["files"]:
        write_text(folder / PROGRESS, json.dumps({**progress, "files": valid_files}))


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
        (_staging_path(out) / PROGRESS).unlink(missing_ok=True)
        replace_folder(_staging_path(out), out)
