"""What a model weighs: parameters, bytes in memory and on disk, and floating-point operations per token."""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from potstill.core.blueprint import Attention, Blueprint, shapes
from potstill.core.errors import NotFound

# Only weights: optimiser states and training arguments also end in .bin, an objective's projectors in .safetensors.
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin", "*.gguf")


@dataclass(frozen=True)
class Parameters:
    """Stored parameters, tied ones counted once: embeddings (with an untied head) and everything else."""

    embeddings: int
    blocks: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embeddings + self.blocks


def count_parameters(model: PreTrainedModel) -> Parameters:
    """The parameters that `model` stores; a tensor shared by several modules counts once."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    inside = {id(p): p.numel() for table in tables if table is not None for p in table.parameters()}
    total = sum(p.numel() for p in model.parameters())
    return Parameters(embeddings=sum(inside.values()), blocks=total - sum(inside.values()))


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of the weights and buffers that a saved state holds, those sharing their memory counted once."""
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(stored.values())


def bytes_on_disk(path: Path) -> int:
    """Bytes of the weight files at `path`, a folder or a file; of several formats in a folder only the first counts.

    Raises: NotFound where there are none.
    """
    if path.is_file():
        return path.stat().st_size
    for pattern in WEIGHT_FILES:
        if found := sorted(path.glob(pattern)):
            return sum(file.stat().st_size for file in found)
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


def forward_flops(blueprint: Blueprint, seen: float) -> Flops:
    """What one token costs that sees `seen` tokens, itself one of them: the mean over a text may be broken.

    Two per weight of every matrix in the blocks and of the head; the embedding is a look-up. In each attention four per
    head dimension and visible token: half for the scores, half for their mix. Norms, rotations and softmax, well under
    one in a hundred of the rest at common widths, are left out.
    """
    matrices = sum(rows * columns for rows, columns in linears(blueprint))
    attention = sum(_attended(layer.mixer, seen) for layer in blueprint.layers)
    return Flops(2.0 * matrices, 4.0 * attention, 2.0 * blueprint.vocabulary * blueprint.hidden)


def linears(blueprint: Blueprint) -> list[tuple[int, int]]:
    """The shape of every matrix that a token is multiplied with inside the blocks."""
    tables = ("embed.weight", "head.weight")
    found = (shape for name, shape in shapes(blueprint).items() if name not in tables)
    return [(shape[0], shape[1]) for shape in found if len(shape) == 2]


def flops_per_token(blueprint: Blueprint, context: int) -> int:
    """Floating-point operations to predict one token after `context` others, as `forward_flops` counts them."""
    return int(forward_flops(blueprint, context + 1.0).total)


def stored(blueprint: Blueprint) -> Parameters:
    """The parameters of a model that is not built yet."""
    sizes = {name: math.prod(shape) for name, shape in shapes(blueprint).items()}
    embeddings = sizes["embed.weight"] + sizes.get("head.weight", 0)
    return Parameters(embeddings=embeddings, blocks=sum(sizes.values()) - embeddings)


def _attended(mixer: Attention, seen: float) -> float:
    return float(mixer.heads) * mixer.head_dim * (seen if mixer.window is None else min(seen, mixer.window))
