"""A blueprint with its weights as the structures that `decoder.c` reads.

Matrices are the model's own memory, so training them in place changes what is decoded; those of a smaller size of an
elastic model are parts of the rows of the largest one's. Norms, biases, and matrices that are quantized or ternary are
copies.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.blueprint import Blueprint, Rotary, weight_shapes
from potstill.core.errors import UnsupportedModel
from potstill.core.parts import DENSE, Linear
from potstill.core.types import Weights
from potstill.decode.native.library import Layer, Matrix, Network
from potstill.decode.native.ternary import read_ternary
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.linear.ternary import Ternary
from potstill.layers.mixers.attention import Attention
from potstill.layers.rotary import LENGTH_DEPENDENT, frequencies
from potstill.models.families.registry import read_weights

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # the bytes of ternary codes
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2}


def read_network(model: PreTrainedModel) -> tuple[Blueprint, Weights]:
    """The blueprint of a model that `decoder.c` expresses, and its weights, which are not copied.

    Raises: UnsupportedModel for any other model.
    """
    blueprint, weights = read_weights(model)
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    if blueprint.tied and len({table.weight.data_ptr() for table in tables}) > 1:
        raise UnsupportedModel("the config ties head and embedding, but they are two tensors")
    for layer in blueprint.layers:
        is_known = type(layer.mixer) is Attention and type(layer.ffn) is SwiGLU
        is_known = is_known and (layer.linear == DENSE or isinstance(layer.linear, Ternary))
        if not is_known or layer.depth is not None or cast(SwiGLU, layer.ffn).activation not in ACTIVATIONS:
            raise UnsupportedModel(f"a layer of {layer.describe()} has no code in C")
        rotary = _get_rotary(blueprint, cast(Attention, layer.mixer))
        if rotary.fraction != 1 or rotary.parameters()["rope_type"] in LENGTH_DEPENDENT:
            raise UnsupportedModel("rotary positions of a part of a head, or by the length of the text, have no C code")
    for name, weight in weights.items():
        if weight.device.type != "cpu" or weight.dtype not in DTYPES or weight.stride(-1) != 1:
            raise UnsupportedModel(
                f"{name} is {weight.dtype} on {weight.device}; the code in C reads float32 and bfloat16"
            )
    return blueprint, {name: weight.detach() for name, weight in weights.items()}


def quantize_rows(weight: Float[Tensor, "N K"]) -> tuple[Tensor, Float[Tensor, " N"]]:
    """(int8 weights, scale of each row): round(127 w / max |w|), the layout of torch's `_weight_int8pack_mm`."""
    scales = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


class NativeNetwork:
    """The structures of one model, and the tensors that they point to."""

    def __init__(self, blueprint: Blueprint, weights: Weights, *, quantize: bool = False) -> None:
        self.blueprint, self.quantize = blueprint, quantize
        self._tensors: list[Tensor] = []
        self._shapes = weight_shapes(blueprint.trainable_form)
        self.embedding = weights["embed.weight"]
        self.head = self._make_matrix(weights, "embed" if blueprint.tied else "head")
        self.layers = (Layer * len(blueprint.layers))()
        for index, layer in enumerate(self.layers):
            self._fill_layer(layer, index, weights)
        self.network = Network(
            layers=self.layers,
            norm=self._keep_norm(weights, "norm.weight"),
            num_layers=len(self.layers),
            hidden=blueprint.hidden,
            norm_eps=blueprint.norm_eps,
        )
        self._tables: list[Tensor] = []

    @property
    def attentions(self) -> list[Attention]:
        """The mixer of every layer."""
        return [cast(Attention, layer.mixer) for layer in self.blueprint.layers]

    @property
    def max_widths(self) -> tuple[int, int, int]:
        """The largest number of query values, of key values and of neurons per token."""
        return (
            max(mixer.heads * mixer.head_dim for mixer in self.attentions),
            max(mixer.kv_heads * mixer.head_dim for mixer in self.attentions),
            max(cast(SwiGLU, layer.ffn).width for layer in self.blueprint.layers),
        )

    def set_buffers(self, buffers: list[tuple[Tensor, Tensor]], capacity: int) -> None:
        """Points the layers to their keys and values, and to tables of angles for `capacity` positions."""
        self.network.capacity = capacity
        tables: dict[tuple[Rotary, int], tuple[Tensor, Tensor]] = {}
        for layer, mixer, (keys, values) in zip(self.layers, self.attentions, buffers, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
            rotary = _get_rotary(self.blueprint, mixer)
            key = (rotary, mixer.head_dim)
            if key not in tables:
                inv_freq, factor = frequencies(rotary, head_dim=mixer.head_dim, context=self.blueprint.context)
                angles = torch.arange(capacity, dtype=torch.float32)[:, None] * torch.tensor(inv_freq)
                tables[key] = ((angles.cos() * factor).contiguous(), (angles.sin() * factor).contiguous())
            layer.cos, layer.sin = (table.data_ptr() for table in tables[key])
        self._tables = [table for pair in tables.values() for table in pair]

    def _fill_layer(self, layer: Any, index: int, weights: Weights) -> None:
        mixer, ffn = self.attentions[index], cast(SwiGLU, self.blueprint.layers[index].ffn)
        prefix, linear = f"layers.{index}", self.blueprint.layers[index].linear
        for name in ("q", "k", "v", "o"):
            setattr(layer, name, self._make_matrix(weights, f"{prefix}.mixer.{name}", linear))
        for name in ("gate", "up", "down"):
            setattr(layer, name, self._make_matrix(weights, f"{prefix}.ffn.{name}", linear))
        for name in ("mixer_norm", "mixer_post_norm", "ffn_norm", "ffn_post_norm"):
            setattr(layer, name, self._keep_norm(weights, f"{prefix}.{name}.weight"))
        for name in ("q_norm", "k_norm"):
            setattr(layer, name, self._keep_norm(weights, f"{prefix}.mixer.{name}.weight"))
        layer.heads, layer.kv_heads, layer.head_dim = mixer.heads, mixer.kv_heads, mixer.head_dim
        layer.window, layer.scale = mixer.window or 0, mixer.softmax_scale
        layer.activation = ACTIVATIONS[ffn.activation]

    def _make_matrix(self, weights: Weights, name: str, linear: Linear = DENSE) -> Matrix:
        bias = weights.get(f"{name}.bias")
        if not isinstance(linear, Ternary):
            return self.make_matrix(weights[f"{name}.weight"], bias)
        rows, columns = self._shapes[f"{name}.weight"]
        codes, scale = read_ternary(weights, name, linear, rows)
        gain = weights.get(f"{name}.norm.weight")
        return Matrix(
            weight=self._keep(codes),
            scale=self._keep(scale.repeat(rows)),
            bias=None if bias is None else self._keep(bias.float()),
            gain=None if gain is None else self._keep(gain.float()),
            rows=rows,
            columns=columns,
            stride=columns,
            dtype=DTYPES[codes.dtype],
            eps=linear.eps,
        )

    def make_matrix(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> Matrix:
        """The structure of a matrix, in int8 with `quantize`; the network keeps its tensors."""
        rows, columns = weight.shape
        scale = None
        if self.quantize:
            weight, scale = quantize_rows(weight)
        return Matrix(
            weight=self._keep(weight),
            scale=None if scale is None else self._keep(scale),
            bias=None if bias is None else self._keep(bias.float()),
            rows=rows,
            columns=columns,
            stride=weight.stride(0),
            dtype=DTYPES[weight.dtype],
        )

    def _keep_norm(self, weights: Mapping[str, Tensor], name: str) -> int | None:
        if name not in weights:
            return None
        return self._keep(weights[name].float() + (1 if self.blueprint.zero_centred_norms else 0))

    def _keep(self, tensor: Tensor) -> int:
        self._tensors.append(tensor)
        return tensor.data_ptr()


def _get_rotary(blueprint: Blueprint, mixer: Attention) -> Rotary:
    return mixer.rotary or blueprint.rotary
