"""What a model weighs: parameters, bytes in memory and on disk, and floating-point operations per token."""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from potstill.core.blueprint import Attention, Blueprint, weight_shapes
from potstill.core.errors import NotFound

# Only weights: optimiser states and training arguments also end in .bin, an objective's projectors in .safetensors.
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin", "*.gguf")


@dataclass(frozen=True)
class ParameterCounts:
    """Stored parameters, tied ones counted once: embeddings (with an untied head) and everything else."""

    embeddings: int
    blocks: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embeddings + self.blocks


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    """The parameters that `model` stores; a tensor shared by several modules counts once."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding_sizes = {id(p): p.numel() for table in tables if table is not None for p in table.parameters()}
    total = sum(p.numel() for p in model.parameters())
    return ParameterCounts(embeddings=sum(embedding_sizes.values()), blocks=total - sum(embedding_sizes.values()))


def count_bytes_in_memory(model: nn.Module) -> int:
    """Bytes of the weights and buffers that a saved state holds, those sharing their memory counted once."""
    bytes_by_pointer = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(bytes_by_pointer.values())


def count_bytes_on_disk(path: Path) -> int:
    """Bytes of the weight files at `path`, a folder or a file; of several formats in a folder only the first counts.

    Raises: NotFound where there are none.
    """
    if path.is_file():
        return path.stat().st_size
    for pattern in WEIGHT_FILES:
        if weight_files := sorted(path.glob(pattern)):
            return sum(file.stat().st_size for file in weight_files)
    raise NotFound(f"{path} holds no weights; they are named {', '.join(WEIGHT_FILES)}")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one token, by part; a multiply-add counts as two."""

    blocks: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.blocks + self.attention + self.head


def forward_flops(blueprint: Blueprint, visible_tokens: float) -> Flops:
    """What one token costs that sees `seen` tokens, itself one of them: the mean over a text may be broken.

    Two per weight of every matrix in the blocks and of the head; the embedding is a look-up. In each attention four per
    head dimension and visible token: half for the scores, half for their mix. Norms, rotations and softmax, well under
    one in a hundred of the rest at common widths, are left out.
    """
    matrices = sum(rows * columns for rows, columns in list_matrix_shapes(blueprint))
    attention = sum(_compute_attention_width(layer.mixer, visible_tokens) for layer in blueprint.layers)
    return Flops(2.0 * matrices, 4.0 * attention, 2.0 * blueprint.vocabulary * blueprint.hidden)


def list_matrix_shapes(blueprint: Blueprint) -> list[tuple[int, int]]:
    """The shape of every matrix that a token is multiplied with inside the blocks."""
    tables = ("embed.weight", "head.weight")
    block_shapes = (shape for name, shape in weight_shapes(blueprint).items() if name not in tables)
    return [(shape[0], shape[1]) for shape in block_shapes if len(shape) == 2]


def flops_per_token(blueprint: Blueprint, context: int) -> int:
    """Floating-point operations to predict one token after `context` others, as `forward_flops` counts them."""
    return int(forward_flops(blueprint, context + 1.0).total)


def count_blueprint_parameters(blueprint: Blueprint) -> ParameterCounts:
    """The parameters of a model that is not built yet."""
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(blueprint).items()}
    embeddings = sizes["embed.weight"] + sizes.get("head.weight", 0)
    return ParameterCounts(embeddings=embeddings, blocks=sum(sizes.values()) - embeddings)


def _compute_attention_width(mixer: Attention, visible_tokens: float) -> float:
    return (
        float(mixer.heads)
        * mixer.head_dim
        * (visible_tokens if mixer.window is None else min(visible_tokens, mixer.window))
    )
