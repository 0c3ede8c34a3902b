"""LoRA students: what is trained, what is merged."""

import pytest
import torch
from transformers import LlamaForCausalLM

from potstill.core.errors import UsageError
from potstill.train.lora import add_adapters, get_adapter_weights, merge_adapters


def test_merged_adapters_give_the_logits_of_the_adapted_model(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.arange(3, 20)[None]
    before = tiny_llama(input_ids=ids).logits
    adapted = add_adapters(tiny_llama, 3)
    assert torch.equal(adapted(input_ids=ids).logits, before)  # they start as nothing
    for weight in (get_adapter_weights(adapted) or {}).values():
        torch.nn.init.normal_(weight, std=0.1)
    after = adapted(input_ids=ids).logits
    assert (after - before).abs().max() > 0.1
    merged = merge_adapters(adapted)
    assert type(merged) is LlamaForCausalLM
    torch.testing.assert_close(merged(input_ids=ids).logits, after, rtol=1e-4, atol=1e-4)
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]


def test_only_adapters_are_trained_and_never_the_head(tiny_llama: LlamaForCausalLM) -> None:
    adapted = add_adapters(tiny_llama, 1)
    trained = get_adapter_weights(adapted)
    assert trained
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trained.keys()


def test_a_model_without_adapters_has_none(tiny_llama: LlamaForCausalLM) -> None:
    assert get_adapter_weights(tiny_llama) is None


def test_a_rank_below_one_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(UsageError, match="rank of 0"):
        add_adapters(tiny_llama, 0)
