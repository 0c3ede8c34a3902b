"""Checkpoints that are complete or absent.

A checkpoint is written to a staging folder, hashed, synced and renamed. `--resume` takes the newest one whose hashes
match.
"""

import json
import re
import shutil
from pathlib import Path

from potstill.core.atomic_files import hash_file, replace_folder, sync_folder, write_text
from potstill.core.errors import ArtifactError

CHECKPOINT_PATTERN = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"
MIN_CHECKPOINTS = 2  # during a run, so that a damaged one leaves another


def get_checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after `step` optimizer steps."""
    return f"checkpoint-{step}"


def seal_checkpoint(
    staged_folder: Path,
    run_folder: Path,
    *,
    run_id: str,
    world_size: int = 1,
    keep: int = MIN_CHECKPOINTS,
    protected_name: str = "",
) -> Path:
    """Hash every file of a staged checkpoint and move it into `run_folder`; returns its new folder.

    Removes older checkpoints, except for the newest `keep` and the one called `protected_name`. The manifest holds
    `run_id`, so that no other run resumes from it, and the number of ranks that wrote it.
    """
    files = {str(f.relative_to(staged_folder)): hash_file(f) for f in sorted(staged_folder.rglob("*")) if f.is_file()}
    write_text(staged_folder / MANIFEST, json.dumps({"study": run_id, "ranks": world_size, "files": files}, indent=1))
    sync_folder(staged_folder)
    destination = run_folder / staged_folder.name
    replace_folder(staged_folder, destination)
    for old in (folder for folder in list_checkpoints(run_folder)[keep:] if folder.name != protected_name):
        shutil.rmtree(old, ignore_errors=True)  # remains of it fail verification, and are removed with the next one
    return destination


def find_latest_checkpoint(run_folder: Path, *, run_id: str, world_size: int = 1) -> Path | None:
    """The newest checkpoint in `run_folder` that `find_fault` accepts; None if the folder has no checkpoint.

    Raises: ArtifactError if there are checkpoints, but none is accepted.
    """
    faults = []
    for folder in list_checkpoints(run_folder):
        fault = find_fault(folder, run_id=run_id, world_size=world_size)
        if fault is None:
            return folder
        faults.append(fault)
    if faults:
        raise ArtifactError(
            f"no checkpoint in {run_folder} can be resumed: {faults[0]}; choose another --out to begin anew, or "
            f"give --overwrite"
        )
    return None


def find_fault(folder: Path, *, run_id: str, world_size: int = 1) -> str | None:
    """Why this run on `world_size` ranks cannot resume from a checkpoint, or None if it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, saved_run_id, saved_world_size = manifest["files"], manifest["study"], manifest.get("ranks", 1)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder.name} was not finished (no readable {MANIFEST})"
    if saved_run_id != run_id:
        return f"{folder.name} belongs to a run with other settings, models or data"
    if saved_world_size != world_size:
        return (
            f"{folder.name} was written by {saved_world_size} ranks, and this run has {world_size}, so use as "
            f"many as before"
        )
    for name, digest in files.items():
        file = folder / name
        if not file.is_file() or hash_file(file) != digest:
            return f"{folder.name}/{name} is missing or altered"
    return None


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The folders of all checkpoints in `run_folder`, the newest first."""
    checkpoints = [
        (int(match[1]), f)
        for f in run_folder.glob("checkpoint-*")
        if (match := CHECKPOINT_PATTERN.fullmatch(f.name)) and f.is_dir()
    ]
    return [folder for _, folder in sorted(checkpoints, reverse=True)]
