"""Checkpoints that are whole or absent: written aside, hashed, synced, renamed; the last that verifies is resumed."""

import json
import re
import shutil
from pathlib import Path

from potstill.core.artefact import hash_file, replace, sync, write_text
from potstill.core.errors import ArtefactError

FOLDER = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"


def name_of(step: int) -> str:
    """The folder of the checkpoint after `step` optimiser steps."""
    return f"checkpoint-{step}"


def seal(staged: Path, run: Path, *, study: str, ranks: int = 1, keep: int = 2, spare: str = "") -> Path:
    """Hash every file of a staged checkpoint, move it into `run`, and remove all but the newest `keep` and `spare`.

    `study` names the run that the checkpoint belongs to, so that no other run takes it up; `ranks` those that wrote it.
    """
    files = {str(f.relative_to(staged)): hash_file(f) for f in sorted(staged.rglob("*")) if f.is_file()}
    write_text(staged / MANIFEST, json.dumps({"study": study, "ranks": ranks, "files": files}, indent=1))
    sync(staged)
    final = run / staged.name
    replace(staged, final)
    for old in (folder for folder in _all(run)[keep:] if folder.name != spare):
        shutil.rmtree(old, ignore_errors=True)  # what is left of it no longer verifies, and goes at the next seal
    return final


def latest(run: Path, *, study: str, ranks: int = 1) -> Path | None:
    """The newest checkpoint of `run` whose hashes verify; None if there is none at all.

    Raises: ArtefactError if there are checkpoints but none is whole, or the newest belongs to another run.
    """
    faults = []
    for folder in _all(run):
        fault = fault_of(folder, study=study, ranks=ranks)
        if fault is None:
            return folder
        faults.append(fault)
    if faults:
        raise ArtefactError(f"no checkpoint in {run} can be resumed: {faults[0]}; start again with --overwrite")
    return None


def fault_of(folder: Path, *, study: str, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint for `ranks` ranks, each of which has its own random state there, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, owner, writers = manifest["files"], manifest["study"], manifest.get("ranks", 1)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder.name} was not finished (no readable {MANIFEST})"
    if owner != study:
        return f"{folder.name} belongs to a run with other settings, models or data"
    if writers != ranks:
        return f"{folder.name} was written by {writers} ranks, and this run has {ranks}; give it as many, or"
    for name, digest in files.items():
        file = folder / name
        if not file.is_file() or hash_file(file) != digest:
            return f"{folder.name}/{name} is missing or altered"
    return None


def _all(run: Path) -> list[Path]:
    found = [(int(hit[1]), f) for f in run.glob("checkpoint-*") if (hit := FOLDER.fullmatch(f.name)) and f.is_dir()]
    return [folder for _, folder in sorted(found, reverse=True)]
