"""A frozen copy computes what its model computes, in less memory."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from potstill.models.frozen_copy import copy_frozen
from potstill.models.inference import inference_context
from potstill.models.signals import probe_model


def logits(model: LlamaForCausalLM, dtype: torch.dtype) -> Tensor:
    ids = torch.arange(3, 40)[None]
    with inference_context(model, dtype=dtype):
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_gives_the_same_bits_and_is_frozen(dtype: torch.dtype, tiny_llama: LlamaForCausalLM) -> None:
    expected = logits(tiny_llama, dtype)
    frozen = copy_frozen(tiny_llama.train(), dtype)
    assert torch.equal(logits(frozen, dtype), expected)
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert tiny_llama.training
    assert probe_model(frozen) is probe_model(tiny_llama)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in tiny_llama.parameters())
    with torch.no_grad():
        tiny_llama.model.norm.weight.add_(1)
    assert torch.equal(logits(frozen, dtype), expected)


def test_weights_of_products_alone_are_held_in_half_precision(tiny_llama: LlamaForCausalLM) -> None:
    frozen = copy_frozen(tiny_llama, torch.bfloat16)
    dtypes = {name.split(".")[-2]: p.dtype for name, p in frozen.named_parameters()}
    assert dtypes["q_proj"] == dtypes["down_proj"] == torch.bfloat16
    assert dtypes["embed_tokens"] == dtypes["norm"] == torch.float32
    assert frozen.lm_head.weight.dtype == (torch.float32 if tiny_llama.config.tie_word_embeddings else torch.bfloat16)


def test_a_model_that_reads_a_weight_in_float32_keeps_all_in_float32(tiny_llama: LlamaForCausalLM) -> None:
    layer = tiny_llama.model.layers[0].mlp.down_proj

    def add_exactly(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return output + inputs[0].float() @ module.weight.float().T

    layer.register_forward_hook(add_exactly)
    expected = logits(tiny_llama, torch.bfloat16)
    frozen = copy_frozen(tiny_llama, torch.bfloat16)
    assert torch.equal(logits(frozen, torch.bfloat16), expected)
    assert {p.dtype for p in frozen.parameters()} == {torch.float32}
