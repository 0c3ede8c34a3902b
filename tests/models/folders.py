"""Model folders and GGUF files as people have them, from tiny models."""

import json
from pathlib import Path

import gguf
import torch
from gguf.quants import quantize
from tests.tiny import byte_tokenizer, random_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
}


def edit_json(file: Path, **changes: object) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def save_folder(folder: Path, *, tied: bool = False, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A whole folder of the tiny Llama."""
    random_llama(byte_tokenizer(), tied=tied).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def write_gguf(folder: Path, *, parts: int = 1) -> tuple[list[Path], LlamaForCausalLM]:
    """The tiny Llama as a GGUF file of 8-bit blocks and 32-bit values, or split into parts as llama.cpp splits."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["he"])  # transformers wants a merge
    model = random_llama(tokenizer, tied=False)
    tensors = {_rename(name): weight for name, weight in model.state_dict().items()}
    for name, weight in tensors.items():
        if "attn_q" in name or "attn_k" in name:  # llama.cpp stores each rotated pair side by side
            heads = 4 if "attn_q" in name else 2
            tensors[name] = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
    names = ["model.gguf"] if parts == 1 else [f"model-{n + 1:05}-of-{parts:05}.gguf" for n in range(parts)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        writer = gguf.GGUFWriter(folder / name, "llama")
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(tensors))
        if number == 0:
            _add_facts(writer, model, tokenizer)
        for tensor_name in list(tensors)[number::parts]:
            values = tensors[tensor_name].numpy()
            kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in tensor_name else gguf.GGMLQuantizationType.F32
            writer.add_tensor(tensor_name, quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return [folder / name for name in names], model


def _rename(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    prefix, _, rest = stem.partition("model.layers.")
    if prefix or not rest:
        return f"{GGUF_NAMES[stem]}.{kind}"
    layer, _, part = rest.partition(".")
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def _add_facts(writer: gguf.GGUFWriter, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    config = model.config
    writer.add_license("mit")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def compute_logits(model: torch.nn.Module) -> torch.Tensor:
    """The logits on fixed tokens."""
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits
