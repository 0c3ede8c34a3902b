"""Folders of edits: a base model by its name, and `edits.safetensors` with the changes of its neurons.

`edits.json` names the base, with the digest of its weights, and the triggers and questions of each edit. A base inside
the folder has a relative name.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from potstill.core.atomic_files import EDITS_FILE, atomic_file, write_text
from potstill.core.errors import ArtifactError, NotFound, UnsupportedModel
from potstill.core.in_memory import IN_MEMORY
from potstill.models.edits import Edit, NeuronDelta
from potstill.models.folder_checks import check_no_pointer, check_text_files, read_json
from potstill.models.locate import PACKAGED_MODEL

WEIGHTS_FILE, BASE_FOLDER = "edits.safetensors", "base"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class EditFolder:
    """What a folder of edits says: its base by name, the digest of the base's weights, the edits, and a template."""

    base: str
    digest: str
    edits: tuple[Edit, ...]
    similarity: float
    chat_template: str | None = None  # in place of the base's


def is_edit_folder(path: Path) -> bool:
    """Whether a folder holds edits of a model."""
    return (path / EDITS_FILE).is_file() and not (path / "config.json").is_file()


def find_base(path: Path) -> str:
    """The name of the base of edits: a path, which may be relative to their folder, or any name of a model.

    Raises: ArtifactError if the folder does not name it.
    """
    check_text_files(path)
    name = read_json(path / EDITS_FILE).get("base")
    if not isinstance(name, str) or not name:
        raise ArtifactError(f"{path / EDITS_FILE} names no base model; set base there")
    relative = path / name
    return str(relative) if relative.exists() else name


def read_chat_template(path: Path) -> str | None:
    """The chat template that the edits of a folder were made with; None where it is the base's."""
    template = read_json(path / EDITS_FILE).get("chat_template")
    return None if template is None else str(template)


def explain_missing_base(path: Path, base: str, error: Exception) -> NotFound:
    """The error for edits whose base is not here."""
    return NotFound(
        f"{path} holds edits, and their base {base} cannot be opened ({str(error).partition(';')[0]}); copy or "
        f"download the base, or set base in {EDITS_FILE} to its path"
    )


def refuse_edits(name: str, path: Path) -> None:
    """Refuse a folder of edits where new weights are written, which would lose them. Raises: UnsupportedModel."""
    if path.is_dir() and is_edit_folder(path):
        is_object = str(name).startswith(IN_MEMORY)
        base = "give its base, loaded without edits" if is_object else f"name its base {find_base(path)}"
        raise UnsupportedModel(f"{name} holds edits of facts, which are no weights and would be lost; {base}")


def save_edits(folder: Path, edit_folder: EditFolder) -> None:
    """Writes `edits.json` and `edits.safetensors`; a base that is a path becomes absolute."""
    tensors = {}
    for number, edit in enumerate(edit_folder.edits):
        for layer, (neurons, values) in edit.deltas.items():
            tensors[f"{number}.{layer}.neurons"] = neurons.detach().cpu().clone()
            tensors[f"{number}.{layer}.values"] = values.detach().float().cpu().clone()
    with atomic_file(folder / WEIGHTS_FILE) as file:
        save_file(tensors, file)
    is_inside = (folder / edit_folder.base).exists()
    is_path = not is_inside and edit_folder.base != PACKAGED_MODEL and Path(edit_folder.base).expanduser().exists()
    facts = {
        "format": FORMAT,
        "base": os.path.abspath(Path(edit_folder.base).expanduser()) if is_path else edit_folder.base,
        "base_digest": edit_folder.digest,
        "similarity": edit_folder.similarity,
        "chat_template": edit_folder.chat_template,
        "edits": [{"triggers": edit.triggers, "prompts": edit.prompts} for edit in edit_folder.edits],
    }
    write_text(folder / EDITS_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def load_edits(path: Path) -> EditFolder:
    """The edits of a folder.

    Raises: ArtifactError for a folder that is incomplete or of another format.
    """
    base, facts = find_base(path), read_json(path / EDITS_FILE)
    if facts.get("format") != FORMAT:
        raise ArtifactError(f"{path / EDITS_FILE} has the format {facts.get('format')}; make the edits again")
    if not (path / WEIGHTS_FILE).is_file():
        raise ArtifactError(f"{path} has no {WEIGHTS_FILE}; copy the edits again")
    check_no_pointer(path / WEIGHTS_FILE)
    try:
        entries = [(tuple(entry["triggers"]), tuple(entry["prompts"])) for entry in facts["edits"]]
        deltas = _read_deltas(path / WEIGHTS_FILE, len(entries))
        similarity, digest = float(facts["similarity"]), str(facts["base_digest"])
    except (KeyError, IndexError, TypeError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"the edits in {path} are damaged ({error}); copy them again") from error
    edits = tuple(
        Edit(triggers=triggers, prompts=prompts, deltas=delta)
        for (triggers, prompts), delta in zip(entries, deltas, strict=True)
    )
    template = read_chat_template(path)
    return EditFolder(base=base, digest=digest, edits=edits, similarity=similarity, chat_template=template)


def open_edits(name: str, path: Path) -> EditFolder:
    """What the folder of edits at `path` says; of any other model, that it is its own base without edits.

    Raises: ArtifactError, as `load_edits` does.
    """
    if path.is_dir() and is_edit_folder(path):
        return load_edits(path)
    return EditFolder(base=name, digest="", edits=(), similarity=0.0)


def copy_base(path: Path, folder: Path) -> str:
    """Copies the files of a model into the folder of its edits; returns the relative name of the base."""
    target = folder / BASE_FOLDER
    if path.is_file():
        target.mkdir()
        shutil.copyfile(path, target / path.name)
    else:
        shutil.copytree(path, target)
    return BASE_FOLDER


def check_digest(path: Path, edit_folder: EditFolder, digest: str) -> None:
    """Refuse a base whose weights are not those that the edits were made on. Raises: ArtifactError."""
    if digest != edit_folder.digest:
        raise ArtifactError(
            f"the edits in {path} were made on other weights than those of {edit_folder.base}; set base in "
            f"{EDITS_FILE} to the model that they were made on, or make them again"
        )


def _read_deltas(file: Path, count: int) -> Sequence[dict[int, NeuronDelta]]:
    """The changes of each of `count` edits, by layer."""
    deltas: list[dict[int, NeuronDelta]] = [{} for _ in range(count)]
    with safe_open(file, "pt") as tensors:
        for name in sorted(tensors.keys()):
            number, layer, kind = name.split(".")
            if kind == "neurons":
                values: Any = tensors.get_tensor(f"{number}.{layer}.values")
                neurons: Any = tensors.get_tensor(name)
                if neurons.dtype != torch.int64 or neurons.shape != values.shape:
                    raise ValueError(f"{name} does not fit its values")
                deltas[int(number)][int(layer)] = NeuronDelta(neurons, values)
    return deltas
