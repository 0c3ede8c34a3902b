"""What a model weighs: parameters, bytes in memory and on disk, and floating-point operations per token."""

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


def flops_per_token(blueprint: Blueprint, context: int) -> int:
    """Floating-point operations to predict one token after `context` others (a multiply-add counts as two).

    Two per weight of every matrix, the head included and the embedding (a look-up) not; in each attention four per
    head dimension and visible token: half for the scores, half for their mix. Norms, rotations and softmax, well under
    one in a hundred of the rest at common widths, are left out.
    """
    matrices = [shape for name, shape in shapes(blueprint).items() if len(shape) == 2 and name != "embed.weight"]
    weights = sum(rows * columns for rows, columns in matrices)
    weights += blueprint.vocabulary * blueprint.hidden if blueprint.tied else 0
    attended = sum(_attended(layer.mixer, context) for layer in blueprint.layers)
    return 2 * weights + 4 * attended


def _attended(mixer: Attention, context: int) -> int:
    seen = context + 1 if mixer.window is None else min(context + 1, mixer.window)
    return mixer.heads * mixer.head_dim * seen
