"""The parts of Qwen3-Next and Qwen3.5: gated attention and Gated DeltaNet, and their weights, which are joined.

`self_attn.q_proj` holds, head by head, the queries and the gate of attention. `linear_attn.in_proj_qkv` and `conv1d`
hold the rows of queries, keys and values.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from potstill.layers.mixers.delta_net import DeltaNet
from potstill.models.families.llama import PART_NAMES

DELTA = "self_attn"  # what `part_names` maps to a mixer; DeltaNet's weights have these names between stock and ours
GATED_DELTA_PART_NAMES = PART_NAMES | {
    DELTA: "mixer",
    **{f"{DELTA}.{name}": f"mixer.{name}" for name in ("rate", "decay", "norm", "q_conv", "k_conv", "v_conv")},
    f"{DELTA}.gate_proj": "mixer.gate",
}
_LINEAR = "linear_attn"
_NAMES = {
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "norm.weight": "norm.weight",
    "in_proj_z.weight": "gate_proj.weight",
    "in_proj_b.weight": "rate.weight",
    "in_proj_a.weight": "decay.weight",
    "out_proj.weight": "o_proj.weight",
}
_QKV, _CONVOLUTION = "in_proj_qkv.weight", "conv1d.weight"


def read_delta_net(config: Any) -> DeltaNet:
    """The linear mixer of a stock config."""
    return DeltaNet(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        gated=True,
        conv_width=config.linear_conv_kernel_dim,
        norm_eps=config.rms_norm_eps,
    )


def write_delta_net(mixer: DeltaNet) -> dict[str, int]:
    """The arguments of a stock config."""
    return {
        "linear_num_key_heads": mixer.heads,
        "linear_num_value_heads": mixer.value_heads,
        "linear_key_head_dim": mixer.head_dim,
        "linear_value_head_dim": mixer.value_dim,
        "linear_conv_kernel_dim": mixer.conv_width,
    }


def split_gated_delta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stock state dict with a weight for each of our maps; they share the memory of the joined ones."""
    separate: dict[str, Tensor] = {}
    for name, weight in state.items():
        layer, _, part = name.partition(f".{_LINEAR}.")
        if part:
            separate |= {
                f"{layer}.{DELTA}.{part_name}": value for part_name, value in _split_linear(part, weight, layer, state)
            }
        elif ".self_attn.q_proj." in name:
            heads = weight.unflatten(0, (-1, 2, len(state[_get_norm_name(name)])))
            separate[name] = heads[:, 0].flatten(0, 1)
            separate[name.replace("q_proj", "gate_proj")] = heads[:, 1].flatten(0, 1)
        else:
            separate[name] = weight
    return separate


def join_gated_delta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stock state dict that `split_gated_delta` took apart."""
    joined: dict[str, Tensor] = {}
    for name, weight in state.items():
        layer, _, part = name.partition(f".{DELTA}.")
        is_linear = f"{layer}.{DELTA}.A_log" in state
        if part and is_linear:
            joined |= {f"{layer}.{_LINEAR}.{stock}": value for stock, value in _join_linear(part, weight, layer, state)}
        elif ".self_attn.q_proj." in name:
            head_dim = len(state[_get_norm_name(name)])
            pair = (weight, state[name.replace("q_proj", "gate_proj")])
            joined[name] = torch.stack([x.unflatten(0, (-1, head_dim)) for x in pair], 1).flatten(0, 2)
        elif ".self_attn.gate_proj." not in name:
            joined[name] = weight
    return joined


def _split_linear(part: str, weight: Tensor, layer: str, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if part in _NAMES:
        yield _NAMES[part], weight
        return
    value_width = state[f"{layer}.{_LINEAR}.out_proj.weight"].shape[1]
    key_width = (len(weight) - value_width) // 2
    rows = weight.split([key_width, key_width, value_width])
    if part == _QKV:
        yield from ((f"{x}_proj.weight", values) for x, values in zip("qkv", rows, strict=True))
    elif part == _CONVOLUTION:
        yield from ((f"{x}_conv.weight", values[:, 0]) for x, values in zip("qkv", rows, strict=True))
    else:
        yield part, weight  # has no place in a blueprint, which the map of names then says


def _join_linear(part: str, weight: Tensor, layer: str, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    stock_names = {part_name: stock for stock, part_name in _NAMES.items()}
    if part in stock_names:
        yield stock_names[part], weight
    elif part == "q_proj.weight":
        yield _QKV, torch.cat([state[f"{layer}.{DELTA}.{x}_proj.weight"] for x in "qkv"])
    elif part == "q_conv.weight":
        yield _CONVOLUTION, torch.cat([state[f"{layer}.{DELTA}.{x}_conv.weight"] for x in "qkv"])[:, None]


def _get_norm_name(name: str) -> str:
    return f"{name.partition('.q_proj.')[0]}.q_norm.weight"
