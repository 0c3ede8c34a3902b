"""Rotary positions: pairs of dimensions rotate by an angle proportional to the position (arXiv:2104.09864, Eq. 34).

Dimension j is paired with j + K/2, as in Hugging Face's Llama. The frequencies of every scaling (linear, dynamic, YaRN,
longrope, llama3) are transformers' own. potstill computes them from the blueprint's `Rotary` and stores no buffer. So a
change of dtype cannot round them, and a model on the meta device has them too.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from potstill.core.blueprint import Rotary
from potstill.core.errors import UnsupportedModel

LENGTH_DEPENDENT = ("dynamic", "longrope")  # scalings whose frequencies depend on the length of the text


@lru_cache(maxsize=256)
def frequencies(
    rotary: Rotary, *, head_dim: int, context: int, length: int | None = None
) -> tuple[tuple[float, ...], float]:
    """(radians per position of each of the pairs that turn, factor on cosines and sines).

    `length` is the number of positions in use; only the scalings in `LENGTH_DEPENDENT` use it, beyond `context`.

    Raises:
        UnsupportedModel: transformers has no such scaling.
    """
    parameters = rotary.parameters()
    kind = parameters["rope_type"]
    # the cache holds plain numbers, which neither the meta device nor inference mode can affect
    with torch.device("cpu"):
        if kind == "default":
            width = rotary.count_rotated(head_dim)
            exponents = torch.arange(0, width, 2, dtype=torch.float) / width
            return tuple((1.0 / (rotary.theta**exponents)).tolist()), 1.0
        inv_freq, factor = _get_rope_function(kind)(
            _build_rope_config(parameters, head_dim, context), torch.device("cpu"), seq_len=length
        )
    return tuple(inv_freq.tolist()), float(factor)


def rotary_cos_sin(
    position_ids: Int[Tensor, "B T"], rotary: Rotary, *, head_dim: int, context: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "B 1 T R"], Float[Tensor, "B 1 T R"]]:
    """(cosines, sines) of every position's angles in the R dimensions that turn, in float32 and rounded to `dtype`."""
    depends_on_length = rotary.parameters()["rope_type"] in LENGTH_DEPENDENT
    length = int(position_ids.max()) + 1 if depends_on_length else None
    inv_freq, factor = frequencies(rotary, head_dim=head_dim, context=context, length=length)
    radians = torch.tensor(inv_freq, dtype=torch.float32, device=position_ids.device)
    angles = (position_ids[..., None].float() * radians).repeat(1, 1, 2)[:, None]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(
    x: Float[Tensor, "B H T K"], cos_sin: tuple[Float[Tensor, "B 1 T R"], Float[Tensor, "B 1 T R"]]
) -> Float[Tensor, "B H T K"]:
    """(x_j, x_{j + R/2}) of the first R dimensions, turned by the position's angle: x cos + (-x_{j + R/2}, x_j) sin."""
    cos, sin = cos_sin
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos_sin), x[..., width:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _get_rope_function(kind: str) -> Callable[..., tuple[Tensor, float]]:
    if kind not in ROPE_INIT_FUNCTIONS:
        kinds = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise UnsupportedModel(f"rotary scaling {kind!r} is not one of {kinds}")
    rope_function: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS[kind]
    return rope_function


def _build_rope_config(parameters: dict[str, Any], head_dim: int, context: int) -> LlamaConfig:
    """The config that transformers' functions need: one head of width `head_dim`."""
    return LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters=parameters,
    )
