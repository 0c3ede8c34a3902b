"""`--train` trains the parameters whose names match, and nothing else."""

import pytest
import torch
from transformers import LlamaForCausalLM

from potstill.core.errors import UsageError
from potstill.train.selection import match_names, select_parameters


def test_gradients_reach_what_matches_and_nothing_else(tiny_llama: LlamaForCausalLM) -> None:
    select_parameters(tiny_llama, r"layers\.0.*norm|q_proj")
    tiny_llama(torch.arange(3, 20)[None]).logits.square().mean().backward()
    with_gradient = {name for name, parameter in tiny_llama.named_parameters() if parameter.grad is not None}
    assert with_gradient == {
        *("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"),
        *(name for name, _ in tiny_llama.named_parameters() if "q_proj" in name),
    }


def test_a_second_selection_replaces_the_first(tiny_llama: LlamaForCausalLM) -> None:
    select_parameters(tiny_llama, "q_proj")
    select_parameters(tiny_llama, "k_proj")
    assert all(("k_proj" in name) == p.requires_grad for name, p in tiny_llama.named_parameters())


@pytest.mark.parametrize(("pattern", "message"), [("router", "such as .*norm"), ("(", "no regular expression")])
def test_what_matches_nothing_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        match_names(["embed.weight", "norm.weight"], pattern)
