"""One rule says which tokens end an answer: those of the generation config, the tokenizer and the chat template."""

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import UsageError
from potstill.decode.stop_tokens import find_stop_tokens, list_stop_tokens, require_stop_tokens


@pytest.mark.parametrize(
    ("configured", "stops"),
    [
        pytest.param([7, 9], {2, 7, 9}, id="a list"),
        pytest.param(7, {2, 7}, id="another token than the tokenizer's"),
        pytest.param(2, {2}, id="the same token"),
        pytest.param(None, {2}, id="the tokenizer's alone"),
    ],
)
def test_the_tokens_of_model_and_tokenizer_end_an_answer(
    configured: list[int] | int | None,
    stops: set[int],
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiny_llama.generation_config.eos_token_id = configured
    assert find_stop_tokens(tiny_llama, tiny_tokenizer) == require_stop_tokens(tiny_llama, tiny_tokenizer) == stops


def test_a_pair_without_a_stop_token_is_refused_where_one_is_needed(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama.generation_config.eos_token_id = tiny_tokenizer.eos_token = tiny_tokenizer.chat_template = None
    assert find_stop_tokens(tiny_llama, tiny_tokenizer) == frozenset()
    with pytest.raises(UsageError, match="ends a text"):
        require_stop_tokens(tiny_llama, tiny_tokenizer)


def test_a_base_model_stops_where_its_template_ends_an_answer(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    end_of_text, _, end_of_turn = range(3)
    tiny_llama.generation_config.eos_token_id = end_of_text
    tiny_tokenizer.eos_token = "<|endoftext|>"
    assert list_stop_tokens(tiny_llama, tiny_tokenizer) == [end_of_text, end_of_turn]
    tiny_tokenizer.chat_template = "a template that writes no answers"
    assert list_stop_tokens(tiny_llama, tiny_tokenizer) == [end_of_text]
