"""A GGUF file holds the model that was written: transformers' own reader gives its logits, tokens and stops."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tests.tiny import CHATML, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from potstill.core.blueprint import Blueprint, Rotary
from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.serialization import freeze
from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model, import_model
from potstill.models.gguf_export.architecture import find_architecture
from potstill.models.gguf_export.file import FileSummary, ModelFacts, write_gguf
from potstill.models.gguf_export.tensors import round_weights_to
from potstill.models.load import load_model

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: Mapping[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e4}),
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**{n: v for n, v in SIZES.items() if n != "head_dim"}, tie_word_embeddings=True),
    # transformers takes these widths of a head for granted when it reads GGUF
    "qwen3": Qwen3Config(**{**SIZES, "head_dim": 128}),
    "gemma3_text": Gemma3TextConfig(**{**SIZES, "head_dim": 256}, sliding_window=8),
}
IDS = torch.arange(3, 60)[None]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and one merge, in the manner of GPT-2; 260 ids."""
    facts = byte_tokenizer()
    vocabulary = {**facts.get_vocab(), "he": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model whose norms and biases are no constants."""
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.2 * torch.randn_like(weight)
    return model


def write(
    file: Path, backbone: Backbone, tokenizer: PreTrainedTokenizerFast | None = None, file_type: str = "f32"
) -> FileSummary:
    facts = ModelFacts("tiny", license="mit")
    return write_gguf(
        file,
        backbone.blueprint,
        backbone.state_dict(),
        tokenizer or merging_tokenizer(),
        facts,
        file_type=file_type,
        stop_tokens=(2, 0),
    )


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


def relative_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_reads_the_same_logits(family: str, tmp_path: Path) -> None:
    model = build(CONFIGS[family])
    write(tmp_path / "a.gguf", import_model(model))
    loaded = load_model(tmp_path / "a.gguf")
    assert loaded.model.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert relative_gap(logits(loaded.model), logits(model)) < 1e-5
    assert loaded.license == "mit"


@pytest.mark.parametrize(
    ("file_type", "block", "half_step"),
    [("f16", 1, 2**-11), ("bf16", 1, 2**-8), ("q8_0", 32, 0.57 / 127), ("q4_0", 32, 1 / 8)],
)
def test_each_weight_is_within_half_a_step_of_its_type(
    file_type: str, block: int, half_step: float, tmp_path: Path
) -> None:
    model = build(CONFIGS["tied llama"])
    summary = write(tmp_path / "a.gguf", import_model(model), file_type=file_type)
    read = load_model(tmp_path / "a.gguf").model.state_dict()
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            assert torch.equal(read[name], weight)
            continue
        largest = weight.unflatten(-1, (-1, block)).abs().amax(-1, keepdim=True)
        gap = (read[name] - weight).unflatten(-1, (-1, block)).abs()
        assert (gap <= 1.01 * half_step * largest + 1e-7).all(), name
        assert gap.any()
    assert summary.tensors[file_type] >= 7 * 7


def vary_widths(backbone: Backbone) -> Backbone:
    """A random model of the same kind whose first layer has fewer heads and neurons."""
    blueprint = backbone.blueprint.change_layers(
        lambda i: i == 0, lambda layer: layer.resize({"kv_heads": 1, "ffn": 64})
    )
    return Backbone(blueprint).eval()


def test_layers_of_several_widths_are_written_as_deci_with_a_size_for_each_layer(tmp_path: Path) -> None:
    summary = write(tmp_path / "a.gguf", vary_widths(import_model(build(CONFIGS["llama"]))))
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert summary.architecture == "deci"
    assert fields["deci.attention.head_count"].contents() == [2, *[4] * 6]
    assert fields["deci.attention.head_count_kv"].contents() == [1, *[2] * 6]
    assert fields["deci.feed_forward_length"].contents() == [64, *[96] * 6]


def test_a_scale_of_the_embedding_that_gemma_lacks_moves_into_the_weights(tmp_path: Path) -> None:
    original = import_model(build(CONFIGS["gemma3_text"]))
    pruned = Backbone(replace(original.blueprint, embedding_scale=11.0)).eval()
    pruned.load_state_dict(original.state_dict())
    write(tmp_path / "a.gguf", pruned)
    loaded = load_model(tmp_path / "a.gguf")
    assert not loaded.model.config.tie_word_embeddings
    assert relative_gap(logits(loaded.model), logits(export_model(pruned))) < 1e-5


def test_a_window_that_llama_cpp_lacks_limits_the_context(tmp_path: Path) -> None:
    config = MistralConfig(**SIZES, sliding_window=32)
    summary = write(tmp_path / "a.gguf", import_model(build(config)))
    assert summary.context == 32
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["llama.context_length"].contents() == 32


def test_the_factors_of_llama_3_are_a_tensor_that_is_one_for_fast_pairs(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    write(tmp_path / "a.gguf", import_model(build(LlamaConfig(**SIZES, rope_parameters=scaling))))
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    factors = tensors["rope_freqs.weight"]
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(8)
    assert (factors[1:] >= factors[:-1] - 1e-6).all()


def change_mixers(blueprint: Blueprint, **changes: Any) -> Blueprint:
    return blueprint.change_layers(
        lambda _: True,
        lambda layer: replace(layer, mixer=replace(layer.mixer, **changes)),  # type: ignore[type-var]
    )


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("llama", lambda b: replace(b, logit_softcap=5.0), "a soft cap on the logits"),
        ("llama", lambda b: change_mixers(b, scale=0.3), "a scale of its own"),
        ("llama", lambda b: replace(b, rotary=Rotary(1e4, freeze({"rope_type": "dynamic", "factor": 2.0}))), "dynamic"),
        ("qwen3", lambda b: change_mixers(b, out_bias=True), "biases of outputs"),
        ("qwen3", lambda b: b.change_layers(lambda i: i == 0, lambda layer: layer.resize({"ffn": 64})), "numbers of"),
        ("gemma3_text", lambda b: change_mixers(b, scale=0.3), "scale of attention"),
    ],
)
def test_what_gguf_cannot_express_is_refused_by_name_with_what_it_can(
    family: str, change: Callable[[Blueprint], Blueprint], says: str
) -> None:
    blueprint = change(import_model(build(CONFIGS[family])).blueprint)
    with pytest.raises(UnsupportedModel, match=f"{says}.*GGUF files hold the shapes of Llama"):
        find_architecture(blueprint)


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    backbone = import_model(build(CONFIGS["llama"]))
    with torch.no_grad():
        backbone.embed.weight[5, 5] = 1e5
    with pytest.raises(UsageError, match=r"token_embd\.weight has a weight beyond 65504; give --type bf16"):
        write(tmp_path / "a.gguf", backbone, file_type="f16")


def test_rows_that_blocks_do_not_divide_are_stored_as_f16(tmp_path: Path) -> None:
    config = LlamaConfig(**{**SIZES, "intermediate_size": 80})
    summary = write(tmp_path / "a.gguf", import_model(build(config)), file_type="q4_0")
    assert summary.tensors == {"f16": 7, "f32": 15, "q4_0": 42, "q8_0": 2}


def test_rounded_weights_are_those_of_the_file(tmp_path: Path) -> None:
    backbone = import_model(build(CONFIGS["llama"]))
    write(tmp_path / "a.gguf", backbone, file_type="q4_0")
    backbone.load_state_dict(round_weights_to(backbone.state_dict(), "q4_0"))
    assert relative_gap(logits(load_model(tmp_path / "a.gguf").model), logits(export_model(backbone))) < 1e-5
