"""What measures and greedy answers do with the settings of a model's generation config: nothing."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.decode.generate import GenerationOptions, generate_texts
from potstill.decode.generation_config import (
    list_unused_settings,
    make_filters,
    plain_generation_config,
    read_sampling_defaults,
)
from potstill.decode.sampling import SamplingFilters
from potstill.evaluate.latency import LatencyConfig, time_model

PROMPT = "the still boils a wash"
SETTINGS: dict[str, Any] = {
    "repetition_penalty": 3.0,
    "num_beams": 3,
    "suppress_tokens": list(range(3, 150)),
    "no_repeat_ngram_size": 1,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
}


@pytest.fixture
def argmax(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Twelve tokens after `PROMPT`, each the argmax after all before it: the definition."""
    ids = list(tiny_tokenizer(PROMPT).input_ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(tiny_llama(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-12:]


@pytest.fixture
def willful(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """The tiny model with a generation config that changes whatever Hugging Face writes."""
    tiny_llama.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=2, **SETTINGS)
    return tiny_llama


def write_greedily(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What a caller of Hugging Face's `generate`, such as lm-eval, gets for `do_sample=False`."""
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    return written[0, ids.shape[1] :].tolist()


def test_greedy_answers_are_the_argmax_whatever_the_generation_config_says(
    argmax: list[int], willful: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert 2 not in argmax
    prompt = [tiny_tokenizer(PROMPT).input_ids]
    (text,) = generate_texts(willful, tiny_tokenizer, prompt, options=GenerationOptions(max_new_tokens=12))
    assert text == tiny_tokenizer.decode(argmax)
    original = willful.generation_config
    assert write_greedily(willful, tiny_tokenizer) != argmax  # what lm-eval would measure
    with plain_generation_config(willful):
        assert write_greedily(willful, tiny_tokenizer) == argmax
        assert willful.generation_config.eos_token_id == 2
    assert willful.generation_config is original


def test_speed_is_measured_without_the_beams_of_the_generation_config(willful: LlamaForCausalLM) -> None:
    speed = time_model(willful, LatencyConfig(prompt_tokens=8, new_tokens=4, runs=1, warm_up=0))
    assert speed.decode.shape == (1,)


def test_the_settings_of_a_generation_config_are_told_apart(tiny_llama: LlamaForCausalLM) -> None:
    assert read_sampling_defaults(tiny_llama) == {}
    assert list_unused_settings(tiny_llama) == []
    settings = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    tiny_llama.generation_config = GenerationConfig(**settings, do_sample=True, min_p=0.0)
    assert read_sampling_defaults(tiny_llama) == settings
    assert list_unused_settings(tiny_llama) == []
    assert make_filters(settings) == SamplingFilters(top_k=20, top_p=0.8, repetition_penalty=1.1)
    tiny_llama.generation_config = GenerationConfig(num_beams=4, suppress_tokens=[5], top_p=1.0)
    assert read_sampling_defaults(tiny_llama) == {}
    assert list_unused_settings(tiny_llama) == ["num_beams", "suppress_tokens"]
