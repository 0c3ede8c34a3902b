"""The activations of gated feed-forwards are those of their definition, at the last token of each text."""

import pytest
import torch
from tests.models.small import SMALL
from torch.nn.functional import silu
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from potstill.core.errors import UnsupportedModel
from potstill.models.families.registry import import_model
from potstill.models.feed_forward import find_down_projections, read_activations
from potstill.models.hf_causal_lm import PotstillForCausalLM
from potstill.models.hf_config import PotstillConfig

TEXTS = [[5, 9, 14, 3], [7, 8], [40]]


def own_form(model: LlamaForCausalLM) -> PotstillForCausalLM:
    """The same network in potstill's own architecture."""
    backbone = import_model(model)
    own = PotstillForCausalLM(PotstillConfig.from_blueprint(backbone.blueprint)).eval()
    own.backbone.load_state_dict(backbone.state_dict())
    return own


def test_activations_are_act_of_the_gate_times_up(tiny_llama: LlamaForCausalLM) -> None:
    activations = read_activations(tiny_llama, TEXTS)
    assert activations.shape == (3, 3, 48)
    for row, text in enumerate(TEXTS):
        stream = tiny_llama.model(torch.tensor([text]), output_hidden_states=True)
        layer = tiny_llama.model.layers[0]
        attended = (
            stream.hidden_states[0]
            + layer.self_attn(
                layer.input_layernorm(stream.hidden_states[0]),
                position_embeddings=tiny_llama.model.rotary_emb(stream.hidden_states[0], torch.arange(len(text))[None]),
                attention_mask=None,
            )[0]
        )
        h = layer.post_attention_layernorm(attended)[0, -1]
        expected = silu(layer.mlp.gate_proj.weight @ h) * (layer.mlp.up_proj.weight @ h)
        torch.testing.assert_close(activations[row, 0], expected.detach())


def test_our_own_architecture_gives_the_same_activations(tiny_llama: LlamaForCausalLM) -> None:
    torch.testing.assert_close(read_activations(own_form(tiny_llama), TEXTS), read_activations(tiny_llama, TEXTS))


def test_padding_behind_a_text_changes_nothing(tiny_llama: LlamaForCausalLM) -> None:
    together = read_activations(tiny_llama, TEXTS)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(read_activations(tiny_llama, [text])[0], together[row])


def test_a_fused_gate_is_a_gate() -> None:
    model = Phi3ForCausalLM(Phi3Config(**{**SMALL, "pad_token_id": 0}))
    assert [module.in_features for module in find_down_projections(model)] == [48, 48]


def networks_without_a_gate() -> list[PreTrainedModel]:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return [gpt2, Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, head_dim=8, **experts))]


@pytest.mark.parametrize("number", [0, 1])
def test_a_model_without_one_gated_feed_forward_a_layer_is_refused(number: int) -> None:
    with pytest.raises(UnsupportedModel, match=r"layer 0 of .* gated feed-forward.*choose a dense model"):
        find_down_projections(networks_without_a_gate()[number])
