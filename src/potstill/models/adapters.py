"""LoRA adapter folders: an adapter is opened on its base, and merged into it."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from potstill.core.errors import ArtifactError, NotFound, UnsafeModel, UnsupportedModel, get_first_line
from potstill.models.folder_checks import check_no_pointer, check_text_files, read_json

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
PROBE_LENGTH = 16
MAX_GAP = 1e-3  # of the largest logit: what merging may round in float32


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter without its base."""
    return (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file()


def has_stray_adapter(path: Path) -> bool:
    """Whether a whole model's folder also holds an adapter, which may be merged already."""
    return (path / CONFIG_FILE).is_file() and (path / "config.json").is_file()


def has_tokenizer(path: Path) -> bool:
    """Whether an adapter's folder brings the tokenizer."""
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def find_base(path: Path) -> str:
    """The name of an adapter's base: a path, which may be relative to the adapter's folder, or a hub id.

    Raises: ArtifactError if the adapter does not name it.
    """
    check_text_files(path)
    name = read_json(path / CONFIG_FILE).get("base_model_name_or_path")
    if not name:
        raise ArtifactError(f"{path / CONFIG_FILE} names no base model; set base_model_name_or_path there")
    relative = path / str(name)
    return str(relative) if relative.is_dir() else str(name)


def explain_missing_base(path: Path, base: str, error: Exception) -> NotFound:
    """The error for an adapter whose base is not here."""
    return NotFound(
        f"{path} is an adapter, and its base {base} cannot be opened ({str(error).partition(';')[0]}); copy or "
        f"download the base, or set base_model_name_or_path in {CONFIG_FILE} to its path"
    )


def merge_adapter(model: PreTrainedModel, path: Path, *, allow_pickle: bool) -> PreTrainedModel:
    """`model` with the adapter of the folder `path` added to its weights, in place.

    Raises:
        UnsafeModel: pickled weights, unless allowed.
        ArtifactError: weights are missing, or belong to another base.
        UnsupportedModel: an adapter that cannot be merged, or not without changing what the model computes.
    """
    from peft import PeftConfig, PeftModel

    _check_adapter_files(path, allow_pickle=allow_pickle)
    if getattr(model, "is_quantized", False):
        raise UnsupportedModel(
            f"{path} adapts a quantized base, which merging would round; name its dense base instead"
        )
    try:
        config = PeftConfig.from_pretrained(str(path))
        if config.task_type not in (None, "CAUSAL_LM") or config.is_prompt_learning:
            raise UnsupportedModel(
                f"{path} is an adapter of the kind {config.peft_type.value}/{config.task_type}, which "
                f"cannot be merged into a causal language model; give a LoRA adapter of one"
            )
        _resize_embedding(model, path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted_model = PeftModel.from_pretrained(model, str(path), use_safetensors=None if allow_pickle else True)
            if any("missing adapter keys" in str(warning.message) for warning in caught):
                raise ArtifactError(f"{path} lacks weights of its adapter; copy the adapter again")
            _check_all_used(adapted_model, path)
            return _merge(adapted_model.eval(), path)
    except (ValueError, KeyError, RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
        if isinstance(error, ArtifactError | UnsupportedModel):
            raise
        raise ArtifactError(
            f"the adapter {path} does not fit its base ({get_first_line(error)}); check its base model"
        ) from error


def _check_adapter_files(path: Path, *, allow_pickle: bool) -> None:
    if (path / WEIGHTS_FILE).is_file():
        check_no_pointer(path / WEIGHTS_FILE)
        return
    if not (path / PICKLE_FILE).is_file():
        raise ArtifactError(f"{path} has an {CONFIG_FILE} but no {WEIGHTS_FILE}; copy the adapter again")
    if not allow_pickle:
        raise UnsafeModel(f"{path} has pickled weights, which can run code; pass --allow-pickle if you trust them")


def _resize_embedding(model: PreTrainedModel, path: Path) -> None:
    """Give the base as many rows as an adapter that was trained with added tokens has saved for its embedding."""
    from safetensors import safe_open

    if not (path / WEIGHTS_FILE).is_file():
        return
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding).rpartition(".")[2]
    with safe_open(path / WEIGHTS_FILE, "pt") as file:
        tables = [key for key in file.keys() if f".{name}." in key and "lora" not in key]  # noqa: SIM118  no mapping
        num_rows = max((file.get_slice(key).get_shape()[0] for key in tables), default=embedding.weight.shape[0])
    if num_rows != embedding.weight.shape[0]:
        model.resize_token_embeddings(num_rows, mean_resizing=False)


def _check_all_used(adapted_model: torch.nn.Module, path: Path) -> None:
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    stored = set(load_peft_weights(str(path), device="cpu"))
    unused = stored - set(get_peft_model_state_dict(adapted_model, save_embedding_layers=True))
    if unused:
        raise ArtifactError(
            f"{path} holds {len(unused)} weights that its base has no place for, such as {min(unused)}; "
            f"check its base model"
        )


@torch.no_grad()
def _merge(adapted_model: Any, path: Path) -> PreTrainedModel:
    """The merged model. Raises: UnsupportedModel if its logits are others than before."""
    num_ids = adapted_model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(num_ids, (1, PROBE_LENGTH), generator=torch.Generator().manual_seed(0))
    before = adapted_model(input_ids=ids, use_cache=False).logits
    merged_model: PreTrainedModel = adapted_model.merge_and_unload(safe_merge=True)
    after = merged_model(input_ids=ids, use_cache=False).logits
    max_gap = max(MAX_GAP, 16 * torch.finfo(before.dtype).eps) * float(before.abs().max())
    if not float((after - before).abs().max()) <= max_gap:
        raise UnsupportedModel(
            f"{path} cannot be merged without changing what it computes, most likely because it adapts a head that is "
            f"shared with the embedding; merge it with its own tool, and give the merged model"
        )
    return merged_model
