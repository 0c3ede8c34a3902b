"""The layers DeltaNet and Gated DeltaNet: transformers' own modules, padding, half precision and fresh weights."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import OlmoHybridConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

from potstill.core.blueprint import Blueprint, Layer, Rotary
from potstill.core.errors import UsageError
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.delta_net import DeltaNet, DeltaNetMixer
from potstill.layers.norm import RMSNorm
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory
from potstill.models.backbone import Backbone, init_weights
from potstill.models.hf_causal_lm import PotstillConfig, PotstillForCausalLM

FACTS = DeltaNet(2, 4, 8, 6, gated=True, allow_neg_eigval=True)
NAMES = {"b": "rate", "a": "decay", "g": "gate"}
PLAIN, GATED = DeltaNet(2, 2, 8, 8), DeltaNet(2, 2, 8, 8, gated=True)
BOTH = pytest.mark.parametrize("facts", [PLAIN, GATED], ids=["plain", "gated"])


def layer(facts: DeltaNet) -> DeltaNetMixer:
    mixer = DeltaNetMixer(facts, PartFactory(16, partial(RMSNorm, eps=1e-5)))
    init_weights(mixer, std=0.4)
    return mixer


def places(ids: Tensor, **rest: object) -> Positions:
    return Positions(ids, Rotary(), 64, **rest)


@pytest.mark.parametrize("length", [1, 9, 70])
def test_it_is_the_stock_layer_of_the_same_weights(length: int) -> None:
    config = OlmoHybridConfig(
        hidden_size=16,
        num_attention_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        num_hidden_layers=2,
    )
    theirs = OlmoHybridGatedDeltaNet(config, 0)
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.4)
    ours = layer(FACTS)
    weights = {}
    for name, weight in theirs.state_dict().items():
        part = name.replace("_proj", "").replace("o_norm", "norm").split(".")
        weights[".".join([NAMES.get(part[0], part[0]), *part[1:]])] = weight
    convolutions = weights.pop("conv1d.weight")[:, 0].split([16, 16, 24])
    weights |= {f"{name}_conv.weight": weight for name, weight in zip("qkv", convolutions, strict=True)}
    ours.load_state_dict(weights)
    x = torch.randn(2, length, 16)
    y, _ = ours(x, places(torch.arange(length).expand(2, -1)))
    torch.testing.assert_close(y, theirs(x), rtol=1e-5, atol=1e-5)


@BOTH
@torch.no_grad()
def test_padding_in_the_middle_and_on_the_right_changes_no_memory(facts: DeltaNet) -> None:
    facts = DeltaNet(2, 2, 8, 8, gated=facts.gated, conv_width=1)  # a wider one would read the zeros
    mixer, x = layer(facts).double(), torch.randn(1, 7, 16).double()
    is_token = torch.tensor([[True, True, False, True, False, True, False]])
    state, alone = mixer.state(), mixer.state()
    mixer(x, places(torch.arange(7)[None], token_mask=is_token), state)
    mixer(x[:, is_token[0]], places(torch.arange(4)[None]), alone)
    torch.testing.assert_close(state.memory[0], alone.memory[0])


@BOTH
def test_autocast_changes_little(facts: DeltaNet) -> None:
    mixer, x, positions = layer(facts), torch.randn(1, 40, 16), places(torch.arange(40)[None])
    exact, state = mixer(x, positions)[0], mixer.state()
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = mixer(x, positions, state)
        half.float().sum().backward()
    assert state.memory[0].dtype is torch.float32
    assert (half.float() - exact).norm() < 0.02 * exact.norm()
    assert all(weight.grad is not None for weight in mixer.parameters())


def test_fresh_weights_forget_slowly() -> None:
    blueprint = Blueprint(30, 16, (Layer(DeltaNet(32, 32, 2, 2, gated=True), SwiGLU(4)),))
    drawn = Backbone(blueprint)
    init_weights(drawn, rng=torch.Generator().manual_seed(0))
    again = Backbone(blueprint)
    init_weights(again, rng=torch.Generator().manual_seed(0))
    fresh = PotstillForCausalLM(PotstillConfig.from_blueprint(blueprint)).backbone
    assert torch.equal(drawn.layers[0].mixer.A_log, again.layers[0].mixer.A_log)
    for model in (drawn, fresh):
        mixer = model.layers[0].mixer
        steps, rates = softplus(mixer.dt_bias), mixer.A_log.exp()
        assert 1e-3 <= steps.min() < 0.01 < steps.max() <= 0.1001
        assert 0 < rates.min() < 4 < 12 < rates.max() <= 16
        assert 0.2 < mixer.q_conv.weight.std() < 0.4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((3, 4, 8, 8), "not a multiple of heads 3"), ((0, 4, 8, 8), "heads is 0"), ((2, 2, 8, 8, False, 0), "conv_width")],
)
def test_a_size_that_it_cannot_have_is_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DeltaNet(*sizes)
