"""Checkpoints that are whole or absent: written aside, hashed, synced, renamed; the last that verifies is resumed."""

import json
import re
import shutil
from pathlib import Path

from potstill.core.atomic_files import hash_file, replace_folder, sync_folder, write_text
from potstill.core.errors import ArtifactError

CHECKPOINT_PATTERN = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"


def get_checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimiser steps."""
    return f"checkpoint-{step}"


def seal_checkpoint(
    staged_folder: Path, run_folder: Path, *, run_id: str, world_size: int = 1, keep: int = 2, protected_name: str = ""
) -> Path:
    """Hash every file of a staged checkpoint, move it into `run`, and remove all but the newest `keep` and `spare`.

    `study` names the run that the checkpoint belongs to, so that no other run takes it up; `ranks` those that wrote it.
    """
    files = {str(f.relative_to(staged_folder)): hash_file(f) for f in sorted(staged_folder.rglob("*")) if f.is_file()}
    write_text(staged_folder / MANIFEST, json.dumps({"study": run_id, "ranks": world_size, "files": files}, indent=1))
    sync_folder(staged_folder)
    destination = run_folder / staged_folder.name
    replace_folder(staged_folder, destination)
    for old in (folder for folder in _list_checkpoints(run_folder)[keep:] if folder.name != protected_name):
        shutil.rmtree(old, ignore_errors=True)  # what is left of it no longer verifies, and goes at the next seal
    return destination


def find_latest_checkpoint(run_folder: Path, *, run_id: str, world_size: int = 1) -> Path | None:
    """The newest checkpoint of `run` whose hashes verify; None if there is none at all.

    Raises: ArtefactError if there are checkpoints but none is whole, or the newest belongs to another run.
    """
    faults = []
    for folder in _list_checkpoints(run_folder):
        fault = find_fault(folder, run_id=run_id, world_size=world_size)
        if fault is None:
            return folder
        faults.append(fault)
    if faults:
        raise ArtifactError(f"no checkpoint in {run_folder} can be resumed: {faults[0]}; start again with --overwrite")
    return None


def find_fault(folder: Path, *, run_id: str, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint for `ranks` ranks, each of which has its own random state there, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, saved_run_id, saved_world_size = manifest["files"], manifest["study"], manifest.get("ranks", 1)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder.name} was not finished (no readable {MANIFEST})"
    if saved_run_id != run_id:
        return f"{folder.name} belongs to a run with other settings, models or data"
    if saved_world_size != world_size:
        return (
            f"{folder.name} was written by {saved_world_size} ranks, and this run has {world_size}; give it as many, or"
        )
    for name, digest in files.items():
        file = folder / name
        if not file.is_file() or hash_file(file) != digest:
            return f"{folder.name}/{name} is missing or altered"
    return None


def _list_checkpoints(run_folder: Path) -> list[Path]:
    checkpoints = [
        (int(match[1]), f)
        for f in run_folder.glob("checkpoint-*")
        if (match := CHECKPOINT_PATTERN.fullmatch(f.name)) and f.is_dir()
    ]
    return [folder for _, folder in sorted(checkpoints, reverse=True)]
