"""Save a model as a folder that transformers 5, transformers 4.57 and what is built on them read alike.

transformers 5 writes rotary positions and tokenizers under new names. Release 4.57 takes a missing `rope_theta` for its
default without an error, and does not open the tokenizer. So the saved files hold the old names too.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.atomic_files import write_text
from potstill.core.device import get_dtype_name
from potstill.core.errors import UsageError

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


def save_model_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, config, generation config and tokenizer of a model to `folder`; the weights in `dtype`."""
    with cast_weights(model, dtype or model.dtype):
        model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)
    add_legacy_fields(folder)


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights in place to values that `dtype` holds; they keep the dtype that they are stored in.

    Raises: UsageError, before any weight changes, for a weight beyond the range of `dtype`.
    """
    largest = torch.finfo(dtype).max
    for name, weight in _list_float_weights(model):
        if float(weight.abs().amax()) > largest:
            raise UsageError(
                f"{name} has a weight beyond {largest:.5g}, the largest number of {get_dtype_name(dtype)}; give "
                f"--save-dtype bfloat16"
            )
    for _, weight in _list_float_weights(model):
        weight.copy_(weight.to(dtype))


@contextlib.contextmanager
def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, the weights of `model` are in `dtype`; at its end they and the config are as before.

    Buffers, such as rotary frequencies, stay as they are. Tied weights stay tied.
    """
    weights = {name: (weight, weight.data) for name, weight in _list_float_weights(model)}
    config_dtype = model.config.dtype
    try:
        for weight, values in weights.values():
            weight.data = values.to(dtype)
        yield
    finally:
        for weight, values in weights.values():
            weight.data = values
        model.config.dtype = config_dtype


def _list_float_weights(model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]


def add_legacy_fields(folder: Path) -> None:
    """Add to the JSON files of a model folder what transformers 4.57 reads under other names."""
    for name, convert in (("config.json", _convert_config), ("tokenizer_config.json", _convert_tokenizer_config)):
        file = folder / name
        if file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            write_text(file, json.dumps(convert(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def make_legacy_rotary_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `rope_parameters` of a config of transformers 5 under the names of transformers 4; empty without them.

    Layers of two kinds have two rotations. transformers 4 scales that of full attention alone.
    """
    rope_parameters = config.get("rope_parameters") or {}
    full = rope_parameters.get(FULL_ATTENTION, rope_parameters)
    if "rope_theta" not in full:
        return {}
    fields = {name: full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    if full.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {name: value for name, value in full.items() if name not in fields}
        if config.get("model_type") == "phi3":  # Phi-3, whose config refuses any further field
            factors = {name: full[name] for name in ("short_factor", "long_factor")}
            fields["rope_scaling"] = {"type": full["rope_type"], **factors}
    if SLIDING_ATTENTION in rope_parameters:
        fields["rope_local_base_freq"] = rope_parameters[SLIDING_ATTENTION]["rope_theta"]
    return fields


def _convert_config(config: dict[str, Any]) -> dict[str, Any]:
    config |= make_legacy_rotary_fields(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _convert_config(config["text_config"])
    return config


def _convert_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra_tokens = config.get("extra_special_tokens")
    if isinstance(extra_tokens, list):  # a mapping in transformers 4, where the list has its former name
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra_tokens
    return config
