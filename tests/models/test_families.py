"""Stock models in and out: equal logits, equal gradients, equal configs, on tiny random weights."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from potstill.core.blueprint import Blueprint, Layer, Rotary, weight_shapes
from potstill.core.errors import UnsupportedModel
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.models.backbone import Backbone
from potstill.models.families.registry import (
    FAMILIES,
    export_model,
    find_family,
    import_model,
    list_parameter_shapes,
    make_config,
    read_blueprint,
)
from potstill.models.hf_causal_lm import PotstillForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
GEMMA: dict[str, Any] = {"pad_token_id": None, "head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 5}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama tied, eps, ids": LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-3, eos_token_id=[5, 6]),
    "llama with every bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, pad_token_id=7),
    "llama with wide heads": LlamaConfig(**SIZES, head_dim=12, hidden_act="gelu_pytorch_tanh"),
    "llama linear": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 tied with a window": Qwen2Config(**SIZES, tie_word_embeddings=True, **WINDOW),
    "qwen2 yarn": Qwen2Config(**SIZES, rope_parameters=YARN, bos_token_id=3, eos_token_id=4),
    "qwen3 tied with wide heads": Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=True),
    "qwen3 with biases and a window": Qwen3Config(**SIZES, head_dim=8, attention_bias=True, **WINDOW),
    "mistral": MistralConfig(**SIZES, sliding_window=None, rope_parameters=LINEAR),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=4, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SIZES, **GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "gemma3 untied, soft-capped, biased": Gemma3TextConfig(
        **SIZES, **GEMMA, tie_word_embeddings=False, final_logit_softcapping=3.0, attention_bias=True
    ),
    "gemma3 full, linear": Gemma3TextConfig(
        **SIZES, **GEMMA, layer_types=["full_attention"] * 2, rope_parameters=LOCAL | {"full_attention": LINEAR}
    ),
    "gemma3 with one query to a key": Gemma3TextConfig(
        **SIZES | {"num_key_value_heads": 4}, **GEMMA, layer_types=["full_attention", "sliding_attention"]
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "mixtral top-1 with a window and wide heads": MixtralConfig(
        **SIZES, num_local_experts=3, num_experts_per_tok=1, sliding_window=4, head_dim=12, router_aux_loss_coef=0.1
    ),
    "qwen2 moe": Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=20),
    "qwen2 moe normalized, window, dense layer": Qwen2MoeConfig(
        **SIZES, **MOE, **WINDOW, shared_expert_intermediate_size=20, mlp_only_layers=[0], norm_topk_prob=True
    ),
    "qwen3 moe": Qwen3MoeConfig(**SIZES, **MOE, head_dim=24, norm_topk_prob=True),
    "qwen3 moe with every second layer dense": Qwen3MoeConfig(
        **SIZES, **MOE, decoder_sparse_step=2, attention_bias=True, use_sliding_window=True, sliding_window=5
    ),
}
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 10,
}
CONFIGS |= {
    "qwen3.5": Qwen3_5TextConfig(**SIZES, **DELTA, head_dim=16),
    "qwen3.5 tied with biases and wide convolutions": Qwen3_5TextConfig(
        **SIZES,
        **DELTA | {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 5},
        head_dim=16,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=YARN | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    ),
}
EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}
PLAIN = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Weights far enough from zero that each matters, biases and gains included."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape) + (weight.ndim == 1))
    use_eager_experts(model)
    return model.eval()


def get_bound(config: PreTrainedConfig, dtype: torch.dtype) -> float:
    """The largest difference of logits: stock routers and delta rules compute in float32, whatever the model is in.

    A norm enlarges the rounding of a delta rule whose outputs are small.
    """
    if hasattr(config, "linear_key_head_dim"):
        return 1e-4
    return max(EXACT[dtype], 1e-6 * hasattr(config, "output_router_logits"))


def use_eager_experts(model: PreTrainedModel) -> None:
    """The grouped products that transformers uses for experts compute no float64."""
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(101, (2, 17))
    return ids, torch.arange(17).expand(2, -1)


def logits(backbone: Backbone, ids: Tensor, positions: Tensor) -> Tensor:
    return backbone.head().logits(backbone(ids, positions).flatten(0, 1)).unflatten(0, ids.shape)


@PLAIN
@pytest.mark.parametrize("dtype", EXACT)
def test_import_and_export_keep_the_logits(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    model, (ids, positions) = random_model(config, dtype), tokens()
    backbone = import_model(model)
    exported = export_model(backbone, model)
    use_eager_experts(exported)
    bound = get_bound(config, dtype)
    stock_logits = model(ids).logits
    torch.testing.assert_close(logits(backbone, ids, positions), stock_logits, rtol=0, atol=bound)
    torch.testing.assert_close(exported(ids).logits, stock_logits, rtol=0, atol=bound)
    assert stock_logits.std() > 0.5
    assert type(exported) is type(model)


@PLAIN
@torch.no_grad()
def test_half_precision_rounds_as_the_stock_model_does(config: PreTrainedConfig) -> None:
    model, (ids, positions) = random_model(config, torch.bfloat16), tokens()
    ours, theirs = logits(import_model(model), ids, positions), model(ids).logits
    assert ours.dtype is torch.bfloat16
    error = (ours - theirs).norm() / theirs.norm()
    if hasattr(config, "output_router_logits"):  # rounded logits send a few tokens to other experts
        error = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median()
    assert error <= 4 * torch.finfo(torch.bfloat16).eps


@PLAIN
@torch.no_grad()
def test_packed_documents_say_what_the_stock_model_says_of_each_alone(config: PreTrainedConfig) -> None:
    model, (ids, positions) = random_model(config), tokens()
    packed = logits(import_model(model), ids.reshape(1, -1), positions.reshape(1, -1))
    alone = torch.cat([model(row[None]).logits for row in ids], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=get_bound(config, torch.float32))


@PLAIN
def test_every_gradient_of_a_loss_is_the_stock_model_s(config: PreTrainedConfig) -> None:
    model, (ids, positions) = random_model(config, torch.float64), tokens()
    backbone = import_model(model)
    for network, output in ((model, model(ids).logits), (backbone, logits(backbone, ids, positions))):
        network.zero_grad()
        cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = {name: weight.grad for name, weight in model.named_parameters()}
    ours = {name: weight.grad for name, weight in backbone.named_parameters()}
    renamed = FAMILIES[config.model_type].import_weights(theirs, tied=backbone.blueprint.tied)  # type: ignore[arg-type]
    assert renamed.keys() == ours.keys()
    scale = get_bound(config, torch.float64)  # of what stock modules compute in float32
    for name, gradient in ours.items():
        assert gradient is not None
        rtol, atol = (1e-6, 1e-9) if scale < 1e-6 else (100 * scale, 0.1 * scale)
        torch.testing.assert_close(gradient, renamed[name], rtol=rtol, atol=atol)


@PLAIN
def test_a_config_read_and_written_again_is_the_same_config(config: PreTrainedConfig) -> None:
    blueprint = read_blueprint(config)
    family = find_family(blueprint)
    assert family is not None
    again = family.to_config(Blueprint.from_dict(blueprint.to_dict()))
    assert again.to_dict() == config.to_dict()


@PLAIN
def test_an_exported_model_saved_and_reopened_by_transformers_is_unchanged(
    config: PreTrainedConfig, tmp_path: Path
) -> None:
    model, (ids, _) = random_model(config), tokens()
    export_model(import_model(model), model).save_pretrained(tmp_path)
    again, problems = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values())
    assert type(again) is type(model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    tied = config.tie_word_embeddings
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


@PLAIN
def test_the_blueprint_alone_tells_the_stored_weights(config: PreTrainedConfig) -> None:
    model = random_model(config)
    found = weight_shapes(read_blueprint(config))
    family = FAMILIES[config.model_type]
    stored = family.import_weights(model.state_dict(), tied=config.tie_word_embeddings)
    assert found == {name: tuple(weight.shape) for name, weight in stored.items()}
    again = family.export_weights(stored)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert list_parameter_shapes(read_blueprint(config)) == {
        name: tuple(weight.shape) for name, weight in model.state_dict().items() if name not in tied
    }


def test_the_blueprint_of_a_qwen3_says_what_its_config_says() -> None:
    blueprint = read_blueprint(CONFIGS["qwen3 with biases and a window"])
    first, second = (layer.mixer for layer in blueprint.layers)
    assert (first.heads, first.kv_heads, first.head_dim, first.window, second.window) == (4, 2, 8, None, 5)
    assert first.qkv_bias
    assert first.out_bias
    assert first.qk_norm
    assert blueprint.layers[0].ffn == SwiGLU(48)


def test_the_blueprint_of_a_gemma3_says_what_its_config_says() -> None:
    blueprint = read_blueprint(CONFIGS["gemma3"])
    first, second = (layer.mixer for layer in blueprint.layers)
    assert (first.window, first.rotary, second.window, second.rotary) == (5, Rotary(1e4), None, None)
    assert first.softmax_scale == second.softmax_scale == 24**-0.5
    assert all(layer.post_norms and layer.mixer.qk_norm for layer in blueprint.layers)
    assert (blueprint.embedding_scale, blueprint.rotary) == (32**0.5, Rotary(1e6))
    assert blueprint.zero_centred_norms
    assert blueprint.tied
    assert blueprint.layers[0].ffn == SwiGLU(48, activation="gelu_pytorch_tanh")


def test_a_gemma3_that_loses_every_sliding_layer_still_opens() -> None:
    model = random_model(CONFIGS["gemma3"])
    whole = import_model(model).blueprint.layers[1:]
    backbone, (ids, positions) = Backbone(replace(read_blueprint(CONFIGS["gemma3"]), layers=whole)).eval(), tokens()
    exported = export_model(backbone)
    assert exported.config.layer_types == ["full_attention"]
    torch.testing.assert_close(exported(ids).logits, logits(backbone, ids, positions), rtol=0, atol=1e-5)


def test_an_imported_network_is_a_copy_in_the_model_s_mode() -> None:
    model = random_model(CONFIGS["llama"]).train()
    backbone = import_model(model)
    assert backbone.training
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.zero_()
    assert all(bool(weight.any()) for weight in model.parameters())


def test_an_exported_model_is_a_copy_in_the_network_s_mode_with_one_tied_weight() -> None:
    backbone = import_model(random_model(CONFIGS["llama tied, eps, ids"])).eval()
    exported = export_model(backbone)
    assert not exported.training
    assert export_model(backbone.train()).training
    assert exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.zero_()
    assert all(bool(weight.any()) for weight in exported.parameters())
    assert all(weight.requires_grad for weight in exported.parameters())


def test_export_takes_over_the_stop_tokens_and_leaves_the_random_numbers_alone() -> None:
    model = random_model(CONFIGS["llama"])
    model.generation_config = GenerationConfig(eos_token_id=[3, 9], temperature=0.5, do_sample=True)
    backbone, before = import_model(model), torch.get_rng_state()
    exported = export_model(backbone, model)
    assert exported.generation_config.eos_token_id == [3, 9]
    assert exported.generation_config is not model.generation_config
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_blueprint_goes_back_to_the_family_it_came_from(name: str) -> None:
    family = find_family(read_blueprint(CONFIGS[name]))
    assert family is not None
    assert family.name == CONFIGS[name].model_type


def test_heads_that_do_not_divide_the_width_are_saved_as_mistral() -> None:
    three = read_blueprint(CONFIGS["llama"]).change_layers(
        lambda _: True, lambda x: replace(x, mixer=replace(x.mixer, heads=3, kv_heads=1))
    )
    backbone, (ids, positions) = Backbone(three), tokens()
    exported = export_model(backbone)
    assert exported.config.model_type == "mistral"
    torch.testing.assert_close(exported(ids).logits, logits(backbone, ids, positions), rtol=0, atol=1e-5)


def test_a_windowed_llama_is_saved_as_mistral() -> None:
    backbone, (ids, positions) = (
        Backbone(read_blueprint(CONFIGS["llama"]).change_layers(lambda _: True, windowed)),
        tokens(),
    )
    exported = export_model(backbone)
    assert exported.config.model_type == "mistral"
    torch.testing.assert_close(exported(ids).logits, logits(backbone, ids, positions), rtol=0, atol=1e-5)


def test_a_mixtral_with_a_shared_expert_is_saved_as_qwen2_moe() -> None:
    blueprint = read_blueprint(CONFIGS["mixtral"]).change_layers(
        lambda _: True, lambda x: replace(x, ffn=replace(x.ffn, shared=SwiGLU(20)))
    )
    backbone, (ids, positions) = Backbone(blueprint), tokens()
    exported = export_model(backbone)
    assert (exported.config.model_type, exported.config.qkv_bias) == ("qwen2_moe", False)
    torch.testing.assert_close(exported(ids).logits, logits(backbone, ids, positions), rtol=0, atol=1e-5)


def windowed(layer: Layer) -> Layer:
    return replace(layer, mixer=replace(layer.mixer, window=3))


def changed(name: str, **facts: Any) -> Blueprint:
    """The blueprint of a config, its second mixer changed."""
    return read_blueprint(CONFIGS[name]).change_layers(
        lambda i: i == 1, lambda x: replace(x, mixer=replace(x.mixer, **facts))
    )


@pytest.mark.parametrize(
    "blueprint",
    [
        changed("llama", kv_heads=1),
        read_blueprint(CONFIGS["llama with every bias"]).change_layers(lambda _: True, windowed),
        read_blueprint(CONFIGS["llama"]).change_layers(
            lambda _: True, lambda x: replace(windowed(x), ffn=SwiGLU(9, bias=True))
        ),
        read_blueprint(CONFIGS["qwen2"]).change_layers(
            lambda _: True, lambda x: replace(x, mixer=replace(x.mixer, out_bias=True, window=3))
        ),
        changed("qwen2", qk_norm=True),
        changed("qwen2 tied with a window", window=4).change_layers(
            lambda i: i == 0, lambda x: replace(x, mixer=replace(x.mixer, window=9))
        ),
        read_blueprint(CONFIGS["llama"]).change_layers(lambda i: i == 1, lambda x: replace(x, ffn=SwiGLU(9))),
        read_blueprint(CONFIGS["qwen2"]).change_layers(lambda _: True, lambda x: replace(x, ffn=SwiGLU(9, bias=True))),
        read_blueprint(CONFIGS["qwen2"]).change_layers(
            lambda _: True, lambda x: replace(x, mixer=replace(x.mixer, qk_norm=True))
        ),
        replace(read_blueprint(CONFIGS["llama"]), embedding_scale=2.0),
        replace(read_blueprint(CONFIGS["mistral"]), zero_centred_norms=True),
        replace(read_blueprint(CONFIGS["qwen2"]), logit_softcap=2.0),
        read_blueprint(CONFIGS["qwen3 tied with wide heads"]).change_layers(
            lambda _: True, lambda x: replace(x, post_norms=True)
        ),
        changed("qwen3 tied with wide heads", rotary=Rotary(7.0)),
        changed("mistral", scale=0.3).change_layers(
            lambda _: True, lambda x: replace(x, mixer=replace(x.mixer, scale=0.3))
        ),
        replace(read_blueprint(CONFIGS["llama"]), rotary=Rotary(1e4, fraction=0.5)),
        replace(read_blueprint(CONFIGS["gemma3"]), rotary=Rotary(1e4, fraction=0.5)),
        changed("qwen3.5", scale=0.3),
        read_blueprint(CONFIGS["qwen3.5"]).change_layers(
            lambda i: i == 0, lambda x: replace(x, mixer=replace(x.mixer, allow_neg_eigval=True))
        ),
        replace(read_blueprint(CONFIGS["qwen3.5"]), zero_centred_norms=False),
        replace(read_blueprint(CONFIGS["gemma3"]), embedding_scale=2.0),
        replace(read_blueprint(CONFIGS["gemma3"]), zero_centred_norms=False),
        changed("gemma3", rotary=Rotary(7.0)),
        changed("gemma3", window=4),
        *(
            read_blueprint(CONFIGS[name]).change_layers(
                lambda i, index=index: i >= index, lambda x, facts=facts: replace(x, ffn=replace(x.ffn, **facts))
            )
            for name, index, facts in (
                ("mixtral", 1, {"count": 3}),  # a pyramid
                ("mixtral", 0, {"weighting": "straight_through"}),
                ("mixtral", 0, {"weighting": "softmax"}),
                ("mixtral", 0, {"shared": SwiGLU(9, bias=True)}),
                ("mixtral", 0, {"expert": SwiGLU(9, bias=True)}),
                ("qwen2 moe", 0, {"shared": None}),
                ("qwen2 moe", 0, {"weighting": "straight_through"}),
                ("qwen3 moe", 1, {"expert": SwiGLU(9)}),
            )
        ),
        read_blueprint(CONFIGS["gemma3"]).change_layers(lambda i: i == 1, lambda x: replace(x, post_norms=False)),
        read_blueprint(CONFIGS["gemma3"]).change_layers(
            lambda _: True, lambda x: replace(x, mixer=replace(x.mixer, scale=0.3))
        ),
    ],
)
def test_what_no_stock_family_expresses_becomes_our_own_architecture(blueprint: Blueprint) -> None:
    assert find_family(blueprint) is None
    backbone, (ids, positions) = Backbone(blueprint).eval(), tokens()
    exported = export_model(backbone)
    assert isinstance(exported, PotstillForCausalLM)
    torch.testing.assert_close(exported(ids).logits, logits(backbone, ids, positions))
    again = import_model(exported)
    assert again.blueprint == blueprint
    torch.testing.assert_close(again(ids, positions), backbone(ids, positions))


def test_a_blueprint_made_by_hand_gets_no_stop_token_that_nobody_chose() -> None:
    by_hand = replace(read_blueprint(CONFIGS["llama"]), extras=())
    config = make_config(by_hand)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert config.initializer_range == LlamaConfig(**SIZES).initializer_range


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UnsupportedModel, match="'gpt2' models cannot be imported; the supported families are llama, q"):
        read_blueprint(GPT2Config())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(**SIZES, attention_dropout=0.1), "attention_dropout is 0.1"),
        (Qwen3_5TextConfig(**SIZES, **DELTA, hidden_act="gelu"), "hidden_act is gelu"),
        (LlamaConfig(**SIZES, rope_parameters=LINEAR | {"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
        (Gemma3TextConfig(**SIZES, **GEMMA, attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0"),
        (MixtralConfig(**SIZES, router_jitter_noise=0.1), "router_jitter_noise is 0.1"),
        (Gemma3TextConfig(**SIZES, **GEMMA, use_bidirectional_attention=True), "use_bidirectional_attention is set"),
    ],
)
def test_what_a_blueprint_cannot_say_is_refused(config: PreTrainedConfig, said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        read_blueprint(config)


def test_a_foreign_weight_is_refused_by_name(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.model.layers[0].self_attn.sink = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedModel, match=r"model.layers.0.self_attn.sink"):
        import_model(tiny_llama)


def test_a_tied_model_whose_head_went_its_own_way_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.lm_head.weight = torch.nn.Parameter(tiny_llama.lm_head.weight + 1.0)
    with pytest.raises(UnsupportedModel, match="ties head and embedding, but their weights differ"):
        import_model(tiny_llama)
