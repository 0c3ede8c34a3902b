"""Distances and masks for texts of different lengths and for trees, in the form that each Hugging Face family reads.

Stock models return a 4-D mask as it is, so it must already hold the window of the layers. Families whose layers differ
(Gemma, Qwen) read a mapping of layer type to mask.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from potstill.core.errors import UnsupportedModel
from potstill.models.hf_config import PotstillConfig


def find_depths(parents: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T T"]]:
    """The depth of each node (0: its parent is the text), and `[b, t, s]` is 1 where s is t or an ancestor of t.

    `parents[b, t]` is smaller than t, or -1 for the text.
    """
    batch, width = parents.shape
    ancestors = torch.eye(width, dtype=torch.long, device=parents.device).repeat(batch, 1, 1)
    batch_index = torch.arange(batch, device=parents.device)
    for node in range(1, width):
        parent = parents[:, node]
        ancestors[:, node] += ancestors[batch_index, parent.clamp(min=0)] * (parent >= 0)[:, None]
    return ancestors.sum(-1) - 1, ancestors


def make_distances(
    lengths: Int[Tensor, " B"],
    depths: Int[Tensor, "B T"],
    ancestors: Int[Tensor, "B T T"] | None,
    span: int,
) -> Int[Tensor, "B T S"]:
    """How many positions before a new token each key lies; -1 where the token does not see the key.

    A new token sees the text of its row and its ancestors among the new tokens; without `ancestors` the new tokens are
    a chain.
    """
    keys = torch.arange(span, device=lengths.device)
    distances = (lengths[:, None] + depths)[:, :, None] - keys
    if ancestors is None:
        return distances.clamp(min=-1)
    distances = distances.where(keys < lengths[:, None, None], -1)
    new_distances = (depths[:, :, None] - depths[:, None, :]).where(ancestors > 0, -1)
    new_keys = lengths[:, None] + torch.arange(depths.shape[1], device=lengths.device)
    return distances.scatter(2, new_keys[:, None, :].expand_as(new_distances), new_distances)


def list_layer_types(config: Any) -> list[str]:
    """The different attention patterns of the layers, as Hugging Face names them."""
    if layer_types := getattr(config, "layer_types", None):
        return sorted(set(layer_types))
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"]
    return ["chunked_attention" if getattr(config, "attention_chunk_size", None) else "full_attention"]


def make_attention_mask(
    config: Any, distances: Int[Tensor, "B T S"], positions: Int[Tensor, "B T"], dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """The argument `attention_mask` for tokens at `positions` that see keys at `distances` (-1: not visible).

    potstill's own models read the distances themselves, since each layer knows its window.

    Raises: UnsupportedModel for a layer type without a mask.
    """
    if isinstance(config, PotstillConfig):
        return distances[:, None]
    config = config.get_text_config()
    is_additive = config._attn_implementation == "eager"
    masks: dict[str, Tensor] = {}
    for layer_type in list_layer_types(config):
        mask = _find_visible(config, layer_type, distances, positions[:, :, None])[:, None]
        masks[layer_type] = _make_additive(mask, dtype) if is_additive else mask
    return masks if len(masks) > 1 else masks.popitem()[1]


def _find_visible(config: Any, layer_type: str, distances: Tensor, positions: Tensor) -> Tensor:
    is_visible = distances >= 0
    match layer_type:
        case "full_attention":
            return is_visible
        case "sliding_attention":
            return is_visible & (distances < config.sliding_window)
        case "chunked_attention":
            return is_visible & (distances <= positions % config.attention_chunk_size)
    raise UnsupportedModel(f"{type(config).__name__} has layers of type {layer_type!r}, for which there is no mask")


def _make_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
