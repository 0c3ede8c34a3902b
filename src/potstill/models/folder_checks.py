"""Checks of a model folder: that it is whole, safe to open, and that its config describes its weights."""

import json
import os
from pathlib import Path
from typing import Any

from potstill.core.errors import ArtifactError, NotFound, UnsafeModel

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth")
POINTER_START = b"version https://git-lfs"  # of the text that Git leaves in place of a file that it has not fetched
POINTER_BYTES = 1024
TEXT_SUFFIXES = (
    ".json",
    ".model",
    ".jinja",
    ".txt",
)  # of configs and tokenizers


def check_model_folder(path: Path, *, allow_pickle: bool, trust_remote_code: bool) -> None:
    """Refuse a folder that is no model, whose weights are pickled, or that brings its own code.

    Raises: NotFound, UnsafeModel, ArtifactError.
    """
    check_text_files(path)
    if not (path / "config.json").is_file():
        raise NotFound(f"{path} has no config.json, so it is not a model's folder; give one that has")
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in read_json(path / name) and not trust_remote_code:
            raise UnsafeModel(f"{path} brings its own code ({name}); pass --trust-remote-code if you trust it")
    if any(path.glob("*.safetensors")):
        _check_shards(path)
    elif pickles := [file for pattern in PICKLE_PATTERNS for file in path.glob(pattern)]:
        if not allow_pickle:
            raise UnsafeModel(f"{path} has pickled weights, which can run code; pass --allow-pickle if you trust them")
        for file in pickles:
            check_no_pointer(file)
    else:
        raise ArtifactError(
            f"{path} has a config.json but no weights in safetensors; copy the model again or, if its weights on the "
            f"hub are pickled and you trust them, pass --allow-pickle"
        )


def check_text_files(folder: Path) -> None:
    """Refuse a folder in which a pointer of Git LFS stands for a config or a tokenizer. Raises: ArtifactError."""
    for file in sorted(folder.iterdir()):
        if file.suffix in TEXT_SUFFIXES and file.is_file():
            check_no_pointer(file)


def check_no_pointer(file: Path) -> None:
    """Refuse a pointer of Git LFS. Raises: ArtifactError."""
    if file.stat().st_size >= POINTER_BYTES or not os.access(file, os.R_OK):
        return
    with file.open("rb") as stream:
        is_pointer = stream.read(len(POINTER_START)) == POINTER_START
    if is_pointer:
        raise ArtifactError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in {file.parent}")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file. Raises: ArtifactError."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); copy the model again") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{file} has a {type(data).__name__} instead of an object; copy the model again")
    return data


def _check_shards(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map", {})
    if index.is_file() and not (isinstance(shards, dict) and shards):
        raise ArtifactError(f"{index} lists no weights; copy the model again")
    files = {path / str(shard) for shard in shards.values()}
    for file in sorted(files or path.glob("*.safetensors")):
        if not file.is_file():
            raise ArtifactError(f"{path} lacks {file.name}, which its index lists; copy the model again")
        check_no_pointer(file)
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} is corrupt or half-written ({error}); copy the model again") from error
