"""What parts report arrives with the signals: ours by name, a stock router's logits."""

import pytest
import torch
from tests.models.small import SMALL
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.errors import UnsupportedModel
from potstill.core.types import Needs
from potstill.layers.ffn.experts import ROUTER_LOGITS, Experts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model
from potstill.models.signals import compute_signals

POSITIONS = torch.cat([torch.arange(5), torch.arange(4)])[None]
STOCK = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3 moe": Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8),
}


def batch() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(3, 90, (1, 9)),
        "position_ids": POSITIONS,
        "documents": (POSITIONS == 0).cumsum(1) - 1,
    }


def test_router_logits_of_our_parts_arrive_at_the_rows_and_pass_gradients() -> None:
    pair, four = (Layer(Attention(4, 2, 8), Experts(SwiGLU(6), count)) for count in (2, 4))
    plain = Layer(Attention(4, 2, 8), SwiGLU(10))
    model = export_model(Backbone(Blueprint(97, 32, (pair, plain, four), context=64))).train()
    needs = Needs(POSITIONS > 0, extras=frozenset({ROUTER_LOGITS, "embeddings"}))
    signals = compute_signals(model, batch(), needs)
    logits = signals.extras[ROUTER_LOGITS]
    assert logits.shape == (7, 2, 4)  # rows, layers with a router, experts
    assert (logits == -torch.inf).sum((0, 2)).tolist() == [14, 0]  # experts that the first layer does not have
    assert signals.extras["embeddings"].shape == (7, 2, 32)
    model.backbone.gradient_checkpointing = True
    again = compute_signals(model, batch(), needs).extras[ROUTER_LOGITS]
    again[:, 1, 0].sum().backward()
    assert model.backbone.layers[2].ffn.router.weight.grad.abs().sum() > 0
    assert not compute_signals(model, batch(), Needs(POSITIONS > 0)).extras


@pytest.mark.parametrize("config", STOCK.values(), ids=STOCK)
@torch.no_grad()
def test_a_stock_router_gives_its_logits(config: PreTrainedConfig) -> None:
    model, data = AutoModelForCausalLM.from_config(config).eval(), batch()
    signals = compute_signals(model, data, Needs(POSITIONS > 0, extras=frozenset({"router_logits"})))
    assert signals.extras["router_logits"].shape == (7, 2, 4)
    first = model(data["input_ids"][:, :5], output_router_logits=True).router_logits
    expected = torch.stack([layer.reshape(1, 5, 4)[0, 1:] for layer in first], 1)
    torch.testing.assert_close(signals.extras["router_logits"][:4], expected, rtol=0, atol=1e-5)


def test_a_model_without_a_router_is_refused_by_the_name_of_what_it_lacks() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    with pytest.raises(UnsupportedModel, match="gives no \\['router_logits'\\]"):
        compute_signals(model, batch(), Needs(POSITIONS > 0, extras=frozenset({"router_logits"})))
