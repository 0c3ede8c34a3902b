"""GGUF files, always as plain dense weights.

transformers can leave GGUF weights packed (4-bit blocks inside the modules); such a model neither trains nor saves.
Here every tensor is dequantized, and the model is rebuilt from its config and state dict as an ordinary model of its
family.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging
from transformers.utils.quantization_config import GgufConfig

from potstill.core.errors import ArtifactError, UnsupportedModel
from potstill.models.gguf_files import get_first_sentence, list_parts, merge_parts, read_metadata

modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # so that its progress bar can be switched off too

HEAD_TENSOR = "output.weight"  # absent where the embedding is the head

# Digits, a joined emoji, CJK, indentation: tokenizers rebuilt from GGUF metadata have failed on these.
PROBES = ("0 12 345 6789 3.14", "naïve café — 🎉👩‍👩‍👧", "世界 こんにちは 안녕", "def f(x):\n\treturn  x\n")


@contextmanager
def cache_gguf_reads() -> Iterator[None]:
    """Inside, a GGUF file is parsed once, and a family's table of tensor names is made once.

    Otherwise transformers parses the file for the config, the weights and the tokenizer, seconds each with a
    vocabulary, and makes the table for each module of the model.
    """
    import gguf

    reader, get_name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    cached_reader = functools.cache(reader)
    gguf.GGUFReader, gguf.get_tensor_name_map = lambda path: cached_reader(str(path)), functools.cache(get_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, get_name_map


def check_model_size(path: Path) -> None:
    """Refuse a GGUF file without its model's size, for which transformers would build the family's default.

    Raises: ArtifactError.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    family = fields["general.architecture"].contents() if "general.architecture" in fields else "general"
    for key in ("block_count", "embedding_length"):
        if f"{family}.{key}" not in fields:
            raise ArtifactError(f"{path} lacks the field {family}.{key}, so it holds no model; convert it again")


def read_config(path: Path) -> PreTrainedConfig:
    """The config of a GGUF model. Its tensors tell whether the head is tied, also where they lie in another part."""
    from gguf import GGUFReader

    read_metadata(path)
    check_model_size(path)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    parts = list_parts(path)
    if len(parts) > 1:
        names = {tensor.name for part in parts for tensor in GGUFReader(part).tensors}
        config.tie_word_embeddings = HEAD_TENSOR not in names
    return config


def load_model(path: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file with dense weights in `dtype`; it trains and saves like any other of its family.

    Raises: ArtifactError if the file is truncated or lacks weights; UnsupportedModel if transformers cannot read it.
    """
    read_metadata(path)
    check_model_size(path)
    try:
        with merge_parts(path) as whole:
            quantized_model, loading_info = AutoModelForCausalLM.from_pretrained(
                whole.parent,
                gguf_file=whole.name,
                quantization_config=GgufConfig(gguf_file=whole.name, dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
    except ArtifactError:
        raise
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UnsupportedModel(
            f"{path} holds an architecture that transformers cannot read from GGUF ({get_first_sentence(error)})"
        ) from error
    if loading_info["missing_keys"]:
        missing = sorted(loading_info["missing_keys"])
        raise ArtifactError(f"{path} lacks {len(missing)} weights, {missing[0]} among them; convert it again")
    config = type(quantized_model.config).from_dict(
        {k: v for k, v in quantized_model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    state = {name: tensor.to(dtype) for name, tensor in quantized_model.state_dict().items()}
    dense_model: PreTrainedModel = type(quantized_model).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype
    )
    dense_model.generation_config = quantized_model.generation_config
    return dense_model


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file.

    Raises: UnsupportedModel if decoding does not return digits, emoji, CJK, code or its own special tokens.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in PROBES:
        round_trip = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        if round_trip.lstrip(" ") != text:  # SentencePiece may put one space in front
            raise UnsupportedModel(f"the tokenizer in {path} reads {text!r} back as {round_trip!r}; use the original's")
    for token in tokenizer.all_special_tokens:
        ids = tokenizer(token, add_special_tokens=False).input_ids
        if ids != [tokenizer.convert_tokens_to_ids(token)]:
            raise UnsupportedModel(f"the tokenizer in {path} splits its own special token {token!r} into {ids}")
    return tokenizer
