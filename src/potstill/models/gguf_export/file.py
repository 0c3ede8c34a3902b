"""Writes a whole GGUF file, one tensor in memory at a time."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_VERSION, MODEL_ARCH_NAMES, GGUFWriter
from transformers import PreTrainedTokenizerBase

from potstill.core.blueprint import Blueprint
from potstill.core.types import Weights
from potstill.models.gguf_export.architecture import find_architecture, get_context, write_hyperparameters
from potstill.models.gguf_export.tensors import FILE_TYPES, StoredTensor, list_tensors
from potstill.models.gguf_export.tokenizer import write_tokenizer


class ModelFacts(NamedTuple):
    """What a GGUF file says about the origin of its model; empty values are left out."""

    name: str
    license: str = ""
    base_model: str = ""
    languages: Sequence[str] = ()


class FileSummary(NamedTuple):
    """What was written: the architecture, the context, and how many tensors of each kind."""

    architecture: str
    context: int
    tensors: dict[str, int]


def write_gguf(
    file: Path,
    blueprint: Blueprint,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    facts: ModelFacts,
    *,
    file_type: str,
    stop_tokens: Sequence[int],
) -> FileSummary:
    """Write a model to `file`, with its matrices as `file_type`: f32, f16, bf16, q8_0 or q4_0.

    Raises: UnsupportedModel for a shape or tokenizer that GGUF cannot express; UsageError for a weight beyond f16.
    """
    architecture = find_architecture(blueprint)
    tensors = list_tensors(blueprint, weights, architecture, file_type=file_type)
    name = MODEL_ARCH_NAMES[architecture.id]
    writer = GGUFWriter(file, name)
    try:
        _write_facts(writer, facts)
        writer.add_file_type(FILE_TYPES[file_type][1])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        write_hyperparameters(writer, blueprint, architecture)
        write_tokenizer(writer, tokenizer, vocabulary=blueprint.vocabulary, stop_tokens=stop_tokens)
        _write_tensors(writer, tensors)
    finally:
        writer.close()
    kinds = Counter(tensor.kind.name.lower() for tensor in tensors)
    return FileSummary(name, get_context(blueprint, architecture), dict(sorted(kinds.items())))


def _write_facts(writer: Any, facts: ModelFacts) -> None:
    writer.add_type("model")
    writer.add_name(facts.name)
    if facts.license:
        writer.add_license(facts.license)
    if facts.languages:
        writer.add_languages(list(facts.languages))
    if facts.base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, facts.base_model)


def _write_tensors(writer: Any, tensors: Sequence[StoredTensor]) -> None:
    for tensor in tensors:
        float32 = np.dtype(np.float32)  # of no effect beside the kind
        writer.add_tensor_info(tensor.name, tensor.weight.shape, float32, tensor.count_bytes(), tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.to_numpy())
