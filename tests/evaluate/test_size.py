from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.errors import NotFound
from potstill.evaluate.size import (
    count_blueprint_parameters,
    count_bytes_in_memory,
    count_parameters,
    forward_flops,
)
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.families.registry import read_blueprint
from potstill.models.weight_files import count_bytes_on_disk


def llama(*, tied: bool) -> LlamaForCausalLM:
    shape = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    return LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    )


BLOCK = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8  # q, k and v, o, the feed-forward, two norms


@pytest.mark.parametrize(("tied", "tables"), [(True, 1), (False, 2)])
def test_parameters_are_counted_by_hand_and_tied_ones_once(tied, tables):
    found = count_parameters(llama(tied=tied))
    assert found.embeddings == tables * 40 * 8
    assert found.blocks == BLOCK + 8
    assert found.total == found.embeddings + found.blocks


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_follow_parameters_and_dtype_in_memory_and_on_disk(tied, tmp_path):
    model = llama(tied=tied)
    assert count_bytes_in_memory(model) == 4 * count_parameters(model).total
    assert count_bytes_in_memory(model.to(torch.bfloat16)) == 2 * count_parameters(model).total
    model.save_pretrained(tmp_path)
    assert 0 < count_bytes_on_disk(tmp_path) - count_bytes_in_memory(model) < 4096  # the header


def test_only_weights_count_on_disk_and_only_one_format(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"12345")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"678")
    (tmp_path / "pytorch_model.bin").write_bytes(b"1" * 100)
    (tmp_path / "objective.safetensors").write_bytes(b"1" * 100)
    (tmp_path / "optimizer.bin").write_bytes(b"1" * 100)
    assert count_bytes_on_disk(tmp_path) == 8


def test_a_file_is_its_own_weights_and_an_empty_folder_has_none(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"1234")
    assert count_bytes_on_disk(file) == count_bytes_on_disk(tmp_path) == 4
    file.unlink()
    with pytest.raises(NotFound, match="has no weight files"):
        count_bytes_on_disk(tmp_path)


def test_flops_are_twice_the_weights_that_multiply_and_grow_with_what_is_seen():
    layer = Layer(Attention(heads=2, kv_heads=1, head_dim=4), SwiGLU(width=12))
    blueprint = Blueprint(vocabulary=40, hidden=8, layers=(layer, layer), tied=True)
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12) + 40 * 8
    assert forward_flops(blueprint, 1.0).total == 2 * weights + 2 * 4 * 8
    assert forward_flops(blueprint, 100.0).total == 2 * weights + 100 * 2 * 4 * 8
    assert forward_flops(replace(blueprint, tied=False), 100.0).total == forward_flops(blueprint, 100.0).total
    windowed = blueprint.change_layers(lambda i: i == 0, lambda old: replace(old, mixer=replace(old.mixer, window=10)))
    assert forward_flops(windowed, 100.0).total == 2 * weights + 110 * 4 * 8


@pytest.mark.parametrize("tied", [True, False])
def test_a_blueprint_stores_what_its_model_stores(tied):
    model = llama(tied=tied)
    assert count_blueprint_parameters(read_blueprint(model.config)) == count_parameters(model)


def test_operations_are_those_that_torch_counts():
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model, tokens = LlamaForCausalLM(config).eval(), 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None])
    # eager attention computes the masked half of the scores too
    assert (
        counter.get_total_flops() == tokens * forward_flops(read_blueprint(config), visible_tokens=float(tokens)).total
    )


def test_operations_split_into_parts_by_hand():
    layer = Layer(Attention(heads=2, kv_heads=1, head_dim=4), SwiGLU(width=12))
    found = forward_flops(Blueprint(vocabulary=40, hidden=8, layers=(layer,), tied=False), visible_tokens=2.5)
    assert (found.blocks, found.attention, found.head) == (2 * (64 + 2 * 32 + 64 + 3 * 96), 4 * 8 * 2.5, 2 * 40 * 8)
    assert found.total == found.blocks + found.attention + found.head
