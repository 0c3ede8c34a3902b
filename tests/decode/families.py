"""Tiny random causal language models of many families, each with what makes its decoding special."""

from typing import Any

import torch
from tests.models.small import SMALL
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.depth import Depth
from potstill.core.parts import Mixer
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.layers.mixers.delta_net import DeltaNet
from potstill.layers.mixers.mlgru import MLGRU
from potstill.models.hf_causal_lm import PotstillConfig, PotstillForCausalLM

WINDOW = {"sliding_window": 6}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = ("mixtral", "deepseek_v3", "qwen3_next")
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOW}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}

# families whose memory is keys and values: model type -> changes of the config
ATTENTION: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, **WINDOW},
    "qwen3": {"head_dim": 8},
    "gemma2": {**GEMMA, **ALTERNATING},
    "gemma3_text": {**GEMMA, **ALTERNATING},
    "mistral": WINDOW,
    "mixtral": MIXTRAL,
    "phi": {},
    "phi3": WINDOW,
    "cohere2": {**WINDOW, **ALTERNATING},
    "olmo2": {},
    "stablelm": {},
    "gpt2": GPT2,
    "gpt_neox": {},
    "opt": OPT,
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
}
# families that read one text at a time: ALiBi, or a recurrence
ROWS: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "falcon": {"alibi": True, "new_decoder_architecture": False},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 6,
    },
    "mamba": {"state_size": 4, "conv_kernel": 3, "expand": 2, "time_step_rank": 4},
    "recurrent_gemma": {"attention_window_size": 8, "lru_width": 32, "head_dim": 8, "num_hidden_layers": 3},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
}


def make_stock_model(model_type: str, changes: dict[str, Any]) -> PreTrainedModel:
    """A random model in eval mode, in float64, or in float32 if torch mixes its experts in nothing larger."""
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    torch.manual_seed(1)
    model = (
        AutoModelForCausalLM.from_config(config).to(torch.float32 if model_type in EXPERTS else torch.float64).eval()
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.3)
            elif weight.ndim > 1 and float(weight.std()) < 0.1:
                weight.normal_(std=0.3)  # far enough from zero that a wrong position or mask shows
    return model


def make_potstill_model() -> PotstillForCausalLM:
    """A network that no stock family expresses: layers of different widths, one with a window."""
    layers = (Layer(Attention(4, 2, 8), SwiGLU(24)), Layer(Attention(2, 1, 6, qk_norm=True, window=4), SwiGLU(10)))
    extras = {"eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    blueprint = Blueprint(97, 16, layers, context=64).update_extras(extras)
    torch.manual_seed(1)
    return PotstillForCausalLM(PotstillConfig.from_blueprint(blueprint)).double().eval()


def stack(*mixers: Mixer, depth: Depth | None = None) -> tuple[Layer, ...]:
    return tuple(Layer(mixer, SwiGLU(24), depth=depth) for mixer in mixers)


FULL, NEAR = Attention(2, 2, 6), Attention(4, 2, 6, window=4)
GATED_DELTA, DELTA = DeltaNet(2, 4, 4, 6, gated=True, conv_width=2), DeltaNet(3, 3, 4, 4)
# potstill's own stacks whose memory is more than keys and values, or not of every token
HYBRIDS = {
    "deltanet": stack(GATED_DELTA, NEAR, DELTA, FULL),
    "deltanet alone": stack(GATED_DELTA, DELTA),
    "mlgru": stack(MLGRU(16), FULL, MLGRU(12, normalized_gate=True)),
    "depths": stack(NEAR, FULL) + stack(FULL, NEAR, DELTA, depth=Depth()),
}


def make_hybrid(
    family: str, *, vocabulary: int = 97, context: int = 64, dtype: torch.dtype = torch.float64
) -> PotstillForCausalLM:
    """A random model with the layers of a family of `HYBRIDS`."""
    extras = {"eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    blueprint = Blueprint(vocabulary, 24, HYBRIDS[family], context=context).update_extras(extras)
    torch.manual_seed(1)
    return PotstillForCausalLM(PotstillConfig.from_blueprint(blueprint)).to(dtype).eval()


def make_model(family: str) -> PreTrainedModel:
    """The tiny model of a family of `ATTENTION`, `ROWS` or `HYBRIDS`, or potstill's own with attention alone."""
    if family in HYBRIDS:
        return make_hybrid(family)
    return make_potstill_model() if family == "potstill" else make_stock_model(family, (ATTENTION | ROWS)[family])
