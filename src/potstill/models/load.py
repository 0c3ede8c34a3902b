"""Load a model by name (`smollm2`, a folder, a `.gguf` file or a hub id) with its tokenizer, license and digest."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.atomic_files import EDITS_FILE, is_partial
from potstill.core.counts import count_noun
from potstill.core.elastic import format_share
from potstill.core.errors import ArtifactError, NotFound, UnsupportedModel, UsageError, get_first_line
from potstill.core.notes import print_note
from potstill.core.screen import status
from potstill.models import adapters, edit_folder, gguf
from potstill.models.edits import Edits, attach_edits
from potstill.models.elastic import copy_size
from potstill.models.folder_checks import check_model_folder
from potstill.models.gguf_files import list_parts
from potstill.models.lineage import read_license
from potstill.models.locate import locate_model, split_size
from potstill.models.quantization import explain_missing_package, read_quantization
from potstill.models.tokenizers.token_bytes import read_token_bytes
from potstill.models.tokenizers.vocabulary import count_usable_ids, refuse_ids_without_rows
from potstill.models.weight_checks import check_weights, untie_head

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with the facts that a card records; `digest` is the SHA-256 over its weight files.

    `quantization` is the method of quantized weights, empty for others.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: Path
    license: str | None
    digest: str
    note: str = ""
    quantization: str = ""

    @property
    def vocabulary(self) -> int:
        """How many ids are tokens with a row in the embedding."""
        return count_usable_ids(self.tokenizer, self.model)

    def move_to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights to a device and a dtype; quantized weights keep their dtype."""
        if getattr(self.model, "is_quantized", False):
            self.model.to(device)
        else:
            self.model.to(device=device, dtype=dtype)


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The model called `name`, in eval mode; `MODEL#0.5` is a size of an elastic model, with weights of its own.

    An adapter's folder is opened on its base and merged. A folder of edits is opened on its base, and decoding applies
    the edits to the prompts that ask for them. Ids of the tokenizer without a row in the embedding are cut;
    a text that holds them is refused.

    Raises:
        NotFound: no such packaged model, folder, file or reachable hub id, or an adapter or edits without the base.
        UnsafeModel: pickled weights or remote code, unless allowed.
        ArtifactError: a folder with missing, truncated or surplus weights, with broken JSON, or edits of other weights.
        UnsupportedModel: transformers cannot open it as a causal language model.
        MissingDependency: a quantized model whose library is not installed.
        UsageError: the model has no such size, or has edits, which fit none of its sizes.
    """
    with status("reading the saved model" if is_partial(name) else f"reading {name}"):
        return _load(name, device=device, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def _load(
    name: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    allow_pickle: bool,
    trust_remote_code: bool,
) -> LoadedModel:
    path = locate_model(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if path.is_dir() and edit_folder.is_edit_folder(path):
        return _load_edits(name, path, dtype=dtype, device=device, options=(allow_pickle, trust_remote_code))
    if path.is_file():
        loaded = _load_gguf(name, path, dtype=dtype)
    elif adapters.is_adapter_folder(path):
        loaded = _load_adapter(name, path, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    else:
        loaded = _load_folder(name, path, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if (share := split_size(name).share) is not None:
        loaded = _load_size(loaded, share)
    refuse_ids_without_rows(loaded.tokenizer, loaded.model)
    return dataclasses.replace(loaded, model=loaded.model.to(device).eval())


def compute_digest(path: Path) -> str:
    """SHA-256 over the weight files of a model (names and contents, in the order of the names)."""
    files = list_parts(path) if path.is_file() else list_weight_files(path)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def list_weight_files(folder: Path) -> list[Path]:
    """The weight files of a model's folder; an adapter that was left in it is none of its weights."""
    files = sorted(entry for entry in folder.iterdir() if entry.suffix in WEIGHT_SUFFIXES)
    stray_names = (adapters.WEIGHTS_FILE, adapters.PICKLE_FILE) if adapters.has_stray_adapter(folder) else ()
    return [file for file in files if file.name not in stray_names]


def _load_size(loaded: LoadedModel, share: float) -> LoadedModel:
    """One size of an elastic model. Its digest is that of the model's files with the size."""
    model = copy_size(loaded.model, share, name=split_size(loaded.name).model)
    digest = hashlib.sha256(f"{loaded.digest} {format_share(share)}".encode()).hexdigest()
    note = ", ".join(filter(None, (loaded.note, f"the size {format_share(share)}")))
    return dataclasses.replace(loaded, model=model, digest=digest, note=note)


def _load_edits(
    name: str | Path, path: Path, *, dtype: torch.dtype, device: str | torch.device, options: tuple[bool, bool]
) -> LoadedModel:
    """The base with the edits attached; `options` are `allow_pickle` and `trust_remote_code`. Its path is the base's.

    Raises: UsageError for a size of the model, whose neurons are others; as `load_model` does.
    """
    if split_size(name).share is not None:
        raise UsageError(f"{name} names a size of a model with edits, which fit the whole model alone; omit the size")
    folder, (allow_pickle, trust_remote_code) = edit_folder.load_edits(path), options
    try:
        base = load_model(
            folder.base, dtype=dtype, device=device, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
        )
    except NotFound as error:
        raise edit_folder.explain_missing_base(path, folder.base, error) from error
    edit_folder.check_digest(path, folder, base.digest)
    if folder.chat_template is not None:
        base.tokenizer.chat_template = folder.chat_template
    attach_edits(base.model, Edits(folder.edits, read_token_bytes(base.tokenizer), similarity=folder.similarity))
    digest = hashlib.sha256(f"{base.digest} {compute_digest(path)}".encode())
    digest.update((path / EDITS_FILE).read_bytes())  # triggers
    note = ", ".join(filter(None, (base.note, f"{count_noun(len(folder.edits), 'edited fact')} on {folder.base}")))
    return dataclasses.replace(base, name=str(name), digest=digest.hexdigest(), note=note)


def _load_gguf(name: str | Path, path: Path, *, dtype: torch.dtype) -> LoadedModel:
    digest = compute_digest(path)
    with gguf.cache_gguf_reads():
        model, tokenizer = gguf.load_model(path, dtype=dtype), gguf.load_tokenizer(path)
        license_name = read_license(path)
    return LoadedModel(model, tokenizer, str(name), path, license_name, digest, "GGUF weights dequantized")


def _load_adapter(
    name: str | Path, path: Path, *, dtype: torch.dtype, allow_pickle: bool, trust_remote_code: bool
) -> LoadedModel:
    """The base with the adapter merged. Its path is the base's, which has the bytes of the merged model."""
    base_name = adapters.find_base(path)
    try:
        base = load_model(base_name, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    except NotFound as error:
        raise adapters.explain_missing_base(path, base_name, error) from error
    model = adapters.merge_adapter(base.model, path, allow_pickle=allow_pickle)
    digest = hashlib.sha256(f"{base.digest} {compute_digest(path)}".encode())
    digest.update((path / adapters.CONFIG_FILE).read_bytes())  # rank and scale
    tokenizer = base.tokenizer
    if adapters.has_tokenizer(path):
        tokenizer = _load_tokenizer(path, trust_remote_code=trust_remote_code)
    note = f"adapter merged into {base_name}"
    return LoadedModel(model, tokenizer, str(name), base.path, base.license, digest.hexdigest(), note)


def _load_folder(
    name: str | Path, path: Path, *, dtype: torch.dtype, allow_pickle: bool, trust_remote_code: bool
) -> LoadedModel:
    check_model_folder(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    quantization, note = read_quantization(path), ""
    model = _load_weights(path, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if adapters.has_stray_adapter(path):
        note = "adapter files beside the model not attached"
        print_note(f"{path} holds a whole model and adapter files, which are not attached; move them to use them")
    if untie_head(model):
        note = "head and embedding differ, so they are not tied"
        print_note(f"config.json in {path} ties head and embedding, and the weights differ; they stay apart here")
    tokenizer = _load_tokenizer(path, trust_remote_code=trust_remote_code)
    note = ", ".join(filter(None, (f"{quantization} weights" if quantization else "", note)))
    return LoadedModel(model, tokenizer, str(name), path, read_license(path), compute_digest(path), note, quantization)


def _load_weights(path: Path, *, dtype: torch.dtype, allow_pickle: bool, trust_remote_code: bool) -> PreTrainedModel:
    import potstill.models.hf_causal_lm  # noqa: F401  registers our own architecture with the Auto classes

    try:
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            adapter_kwargs={"subfolder": "no-adapter"},  # else it attaches one that lies beside config.json
        )
    except ImportError as error:
        raise explain_missing_package(path, read_quantization(path), error) from error
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UnsupportedModel(
            f"transformers cannot open {path} as a causal language model: {get_first_line(error)}"
        ) from error
    check_weights(path, model, missing=loading_info["missing_keys"], unexpected=loading_info["unexpected_keys"])
    loaded_model: PreTrainedModel = model
    return loaded_model


def _load_tokenizer(path: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise ArtifactError(f"{path} has no readable tokenizer ({get_first_line(error)}); copy its files") from error
    return tokenizer
