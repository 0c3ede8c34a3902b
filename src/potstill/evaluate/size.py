"""The size of a model: parameters, bytes in memory, and floating-point operations per token."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from potstill.core.blueprint import Blueprint, weight_shapes
from potstill.models.backbone import Backbone
from potstill.models.hf_causal_lm import PotstillForCausalLM


@dataclass(frozen=True)
class ParameterCounts:
    """Stored parameters, tied ones and each expert counted once: embeddings (with an untied head) and all others."""

    embeddings: int
    blocks: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.embeddings + self.blocks


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    """The stored parameters of `model`; a tensor that several modules share counts once.

    Each weight of a packed matrix of ours counts. Packed matrices of other libraries are no parameters.
    """
    if isinstance(model, PotstillForCausalLM):
        return count_blueprint_parameters(model.backbone.blueprint)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding_sizes = {id(p): p.numel() for table in tables if table is not None for p in table.parameters()}
    total = sum(p.numel() for p in model.parameters())
    return ParameterCounts(embeddings=sum(embedding_sizes.values()), blocks=total - sum(embedding_sizes.values()))


def count_bytes_in_memory(model: nn.Module) -> int:
    """Bytes of the weights and buffers of the state dict; tensors that share memory count once."""
    bytes_by_pointer = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(bytes_by_pointer.values())


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one token, by part; a multiply-add counts as two.

    `blocks` are those with weights, `attention` those over the visible tokens or the memory of them.
    """

    blocks: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.blocks + self.attention + self.head


def forward_flops(blueprint: Blueprint, visible_tokens: float) -> Flops:
    """Operations for one token that sees `visible_tokens`, itself included; a mean over a text may be a fraction.

    Two for each multiply-add of the layers (`Cost`) and of the head; the embedding is a look-up. Of experts only the
    active ones count.
    """
    costs = [layer.cost(blueprint.hidden, visible_tokens) for layer in blueprint.layers]
    return Flops(
        2.0 * sum(cost.matrices for cost in costs),
        2.0 * sum(cost.seen for cost in costs),
        2.0 * blueprint.vocabulary * blueprint.hidden,
    )


def count_state_bytes(blueprint: Blueprint, tokens: int, *, itemsize: int = 2) -> int:
    """Bytes of the states of all layers (keys and values, or memories) after a text of `tokens` tokens.

    Numbers of the model's dtype take `itemsize` bytes; memories in float32 take 4 whatever it is.
    """
    return sum(layer.state_bytes(tokens, itemsize) for layer in blueprint.layers)


def count_weight_bytes(blueprint: Blueprint, *, itemsize: int = 2) -> int:
    """Bytes of all stored weights, if numbers of the model's dtype take `itemsize`; packed codes take one a byte."""
    with torch.device("meta"):
        weights = Backbone(blueprint).state_dict().values()
    return sum(w.numel() * (itemsize if w.dtype.is_floating_point else w.itemsize) for w in weights)


def count_state_growth(blueprint: Blueprint, tokens: int, *, itemsize: int = 2) -> int:
    """Bytes that the states of all layers grow by with the next token of a text of `tokens` tokens."""
    longer, shorter = (count_state_bytes(blueprint, n, itemsize=itemsize) for n in (tokens + 1, tokens))
    return longer - shorter


def list_matrix_shapes(blueprint: Blueprint) -> list[tuple[int, int]]:
    """The shape of every stored matrix inside the blocks, those of all experts included."""
    tables = ("embed.weight", "head.weight")
    block_shapes = (shape for name, shape in weight_shapes(blueprint).items() if name not in tables)
    return [(shape[0], shape[1]) for shape in block_shapes if len(shape) == 2]


def count_blueprint_parameters(blueprint: Blueprint) -> ParameterCounts:
    """The stored parameters of a blueprint's model, without building it; each weight of a packed matrix counts."""
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(blueprint.trainable_form).items()}
    embeddings = sizes["embed.weight"] + sizes.get("head.weight", 0)
    return ParameterCounts(embeddings=embeddings, blocks=sum(sizes.values()) - embeddings)
