"""In a probe every expert computes every token: the same function, in which no token rounds by the others."""

import copy

import pytest
import torch
from tests.models.small import SMALL
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig

from potstill.core.blueprint import Blueprint, Layer
from potstill.layers.ffn.experts import Experts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone
from potstill.models.dense_experts import IMPLEMENTATION_NAME, dense_experts
from potstill.models.families.registry import export_model
from potstill.models.probing import compute_hidden_states, sees_no_later_token

STOCK = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2 moe": Qwen2MoeConfig(
        **SMALL, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=8, mlp_only_layers=[0]
    ),
    "dense": LlamaConfig(**SMALL),
}


@pytest.mark.parametrize("config", STOCK.values(), ids=STOCK)
def test_a_stock_model_gives_the_same_states_and_gets_its_implementation_back(config: PreTrainedConfig) -> None:
    model, ids = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval(), torch.randint(3, 90, (1, 9))
    name, states = model.config._experts_implementation, compute_hidden_states(model, ids)
    with dense_experts(model):
        assert (model.config._experts_implementation == IMPLEMENTATION_NAME) == ("experts" in str(model))
        torch.testing.assert_close(compute_hidden_states(model, ids), states, rtol=0, atol=1e-5)
    assert model.config._experts_implementation == name
    assert sees_no_later_token(model)


def test_experts_of_a_realistic_width_show_that_they_are_causal() -> None:
    layer = Layer(Attention(4, 2, 32), Experts(SwiGLU(512), 4))
    torch.manual_seed(0)
    model = export_model(Backbone(Blueprint(90, 256, (layer,) * 4, context=64))).eval()
    ids, other_ids = torch.randint(3, 90, (2, 1, 12))
    with dense_experts(model):
        before, after = (compute_hidden_states(model, torch.cat([ids, row], 1))[:, :12] for row in (ids, other_ids))
    assert torch.equal(before, after)
    assert sees_no_later_token(model)
    assert not any(getattr(module, "is_dense", False) for module in model.modules())
