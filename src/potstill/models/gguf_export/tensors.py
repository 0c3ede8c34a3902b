"""The tensors of a GGUF file: llama.cpp's names, its order of rows, and blocks of 8 or 4 bits."""

from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, LlamaFileType, get_tensor_name_map
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from torch import Tensor

from potstill.core.blueprint import Blueprint
from potstill.core.errors import UsageError
from potstill.core.types import Weights
from potstill.models.families.llama import HEAD, convert_weights_to_hf, list_attentions
from potstill.models.gguf_export.architecture import Architecture, compute_rotary_factors

HEAD_TENSOR, EMBED_TENSOR, ROTARY_TENSOR = "output.weight", "token_embd.weight", "rope_freqs.weight"
FILE_TYPES = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
BLOCK = 32  # values that share one scale in q8_0 and q4_0
LARGEST_F16 = float(np.finfo(np.float16).max)


class StoredTensor(NamedTuple):
    """A tensor with its name in the file and the kind in which it is stored."""

    name: str
    weight: Tensor
    kind: Kind

    def count_bytes(self) -> int:
        """The bytes that it takes in the file."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.weight.numel() // block * block_bytes

    def to_numpy(self) -> NDArray[np.generic]:
        """The values as they are stored."""
        values: NDArray[np.generic] = quantize(self.weight.float().contiguous().numpy(), self.kind)
        return values


def list_tensors(
    blueprint: Blueprint, weights: Weights, architecture: Architecture, *, file_type: str
) -> list[StoredTensor]:
    """All tensors of a model in the order of the file.

    Norms and biases stay in float32. A matrix whose rows are no multiple of 32 is stored as f16 in a file of blocks. In
    a q4_0 file embedding and head have blocks of 8 bits, since they are read and written as they are.

    Raises: UsageError for a weight that float16 cannot hold.
    """
    kind = FILE_TYPES[file_type][0]
    names = get_tensor_name_map(architecture.id, len(blueprint.layers))
    tensors = []
    for hf_name, weight in _arrange(blueprint, weights, architecture).items():
        stem, _, suffix = hf_name.rpartition(".")
        name = f"{names.get_name(stem)}.{suffix}"
        tensors.append(StoredTensor(name, weight, _choose_kind(name, weight, kind)))
    if factors := compute_rotary_factors(blueprint):
        tensors.append(StoredTensor(ROTARY_TENSOR, torch.tensor(factors), Kind.F32))
    for tensor in tensors:
        if tensor.kind == Kind.F16 and float(tensor.weight.abs().amax()) > LARGEST_F16:
            raise UsageError(f"{tensor.name} has a weight beyond {LARGEST_F16:.5g}; give --type bf16 or f32")
    return tensors


def _choose_kind(name: str, weight: Tensor, kind: Kind) -> Kind:
    if weight.ndim < 2:
        return Kind.F32
    if kind in (Kind.Q8_0, Kind.Q4_0) and weight.shape[-1] % BLOCK:
        return Kind.F16
    return Kind.Q8_0 if kind == Kind.Q4_0 and name in (EMBED_TENSOR, HEAD_TENSOR) else kind


def _arrange(blueprint: Blueprint, weights: Weights, architecture: Architecture) -> dict[str, Tensor]:
    """The weights under Hugging Face's names with the values that llama.cpp wants."""
    scaled = absorb_embedding_scale(blueprint, weights, architecture.get_embedding_scale(blueprint.hidden))
    state = convert_weights_to_hf(scaled, architecture.part_names)
    if "head.weight" not in scaled:
        del state[HEAD]
    mixers = list_attentions(blueprint)
    for name, weight in state.items():
        if blueprint.zero_centred_norms and name.endswith("norm.weight"):
            state[name] = weight + 1
        part = name.split(".")[-2]
        if architecture.rotates_neighbors and part in ("q_proj", "k_proj"):
            mixer = mixers[int(name.split(".")[2])]
            state[name] = interleave_halves(weight, mixer.heads if part == "q_proj" else mixer.kv_heads)
    return state


def absorb_embedding_scale(blueprint: Blueprint, weights: Weights, scale: float) -> dict[str, Tensor]:
    """The weights of the same function in a model that multiplies its embedding by `scale`.

    Where the scales differ, the head gets weights of its own.
    """
    state = dict(weights)
    if blueprint.embedding_scale != scale:
        state.setdefault("head.weight", weights["embed.weight"])
        state["embed.weight"] = weights["embed.weight"] * (blueprint.embedding_scale / scale)
    return state


def interleave_halves(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head in the order 0, K/2, 1, K/2 + 1, ...: Hugging Face pairs halves, llama.cpp neighbors."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def round_weights_to(weights: Weights, file_type: str) -> dict[str, Tensor]:
    """The weights, under potstill's names, as a file of this type holds them."""
    kind = FILE_TYPES[file_type][0]
    rounded = {}
    for name, weight in weights.items():
        stored_name = {"embed.weight": EMBED_TENSOR, "head.weight": HEAD_TENSOR}.get(name, name)
        tensor = StoredTensor(name, weight, _choose_kind(stored_name, weight, kind))
        rounded[name] = torch.from_numpy(dequantize(tensor.to_numpy(), tensor.kind).copy()).view(weight.shape)
    return rounded
