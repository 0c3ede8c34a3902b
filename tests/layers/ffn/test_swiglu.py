"""The gated feed-forward, by hand and against Llama's."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from potstill.core.blueprint import Rotary
from potstill.core.errors import UnsupportedModel
from potstill.layers.ffn.swiglu import GatedFeedForward, SwiGLU
from potstill.layers.norm import RMSNorm
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory


def make(facts: SwiGLU, hidden: int) -> GatedFeedForward:
    return GatedFeedForward(facts, PartFactory(hidden, partial(RMSNorm, eps=1e-5)))


def places(tokens: int) -> Positions:
    return Positions(torch.arange(tokens)[None], Rotary(), 64)


def test_one_neuron_by_hand() -> None:
    layer = make(SwiGLU(1), 1)
    for part, value in ((layer.gate, 2.0), (layer.up, 3.0), (layer.down, 5.0)):
        part.weight.data.fill_(value)
    silu = 2.0 / (1.0 + 2.718281828459045**-2.0)
    torch.testing.assert_close(layer(torch.ones(1, 1, 1), places(1)), torch.full((1, 1, 1), 5.0 * silu * 3.0))


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_llama_s_with_any_activation(activation: str, bias: bool) -> None:
    theirs = LlamaMLP(
        LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=12, hidden_act=activation, mlp_bias=bias)
    )
    ours = make(SwiGLU(12, bias, activation), 8)
    ours.load_state_dict({name.replace("_proj", ""): weight for name, weight in theirs.state_dict().items()})
    x = torch.randn(2, 3, 8)
    assert torch.equal(ours(x, places(3)), theirs(x))


def test_an_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="'swoosh'"):
        make(SwiGLU(4, activation="swoosh"), 4)
