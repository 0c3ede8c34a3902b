"""What is written in one batch with a cache is what each prompt alone, read anew for every token, would give."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.decode.generate import GenerationOptions, generate, generate_texts
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling

STOP = 2
SAMPLING = Sampling(vocabulary=259, stop=frozenset({STOP}))


def alone(
    voices: Sequence[tuple[float, LlamaForCausalLM]],
    prompt: torch.Tensor,
    noise: torch.Tensor,
    limit: int,
    how: Sampling,
) -> list[int]:
    """The definition: the whole text is read again for every token, without a cache, a mask or another row."""
    ids = prompt.tolist()
    for u in noise[:limit].tolist():
        with torch.no_grad():
            logits = [(w, model(torch.tensor([ids]), use_cache=False).logits[0, -1]) for w, model in voices]
        likely = sum(w * (z[: how.vocabulary].double() / how.temperature).softmax(-1) for w, z in logits)
        assert isinstance(likely, torch.Tensor)
        ids.append(int((likely.cumsum(0) <= u).sum()))
        if ids[-1] in how.stop:
            break
    return ids[len(prompt) :]


@pytest.fixture
def prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tiny_tokenizer(text).input_ids for text in ("Say", "What is the capital of France?", "Hello there", "2+2")]


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 250, (n,), generator=generator) for n in lengths]


def noise_of(rows: int, width: int = 24) -> torch.Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(8))


def often_stopping(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """`model` in float64, and likely to stop where the token 40 is likely; of itself, its stop token's row is zero."""
    model = model.double()
    with torch.no_grad():
        model.model.embed_tokens.weight[STOP] = 2 * model.model.embed_tokens.weight[40]
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_batch_with_a_cache_writes_what_each_prompt_alone_gives(
    temperature: float, tiny_llama: LlamaForCausalLM
) -> None:
    model, limits = often_stopping(tiny_llama), [24, 3, 24, 1, 17]
    prompts, noise = prompts_of(1, 9, 4, 13, 4), noise_of(5)
    how = Sampling(vocabulary=259, stop=frozenset({STOP}), temperature=temperature)
    found = generate([(1.0, model)], prompts, noise, limits, how)
    expected = [alone([(1.0, model)], prompt, u, n, how) for prompt, u, n in zip(prompts, noise, limits, strict=True)]
    assert found == expected
    assert any(len(text) < limit for text, limit in zip(found, limits, strict=True))  # some ended
    assert any(text[-1] != STOP for text in found)  # some were cut


def test_two_voices_write_from_the_mixture_of_what_they_say(tiny_llama: LlamaForCausalLM) -> None:
    model = often_stopping(tiny_llama)
    other = LlamaForCausalLM(model.config).double().eval()
    voices, prompts, noise = [(0.2, other), (0.8, model)], prompts_of(3, 8), noise_of(2)
    found = generate(voices, prompts, noise, [24, 24], SAMPLING)
    assert found == [alone(voices, prompt, u, 24, SAMPLING) for prompt, u in zip(prompts, noise, strict=True)]
    assert found != generate([(1.0, model)], prompts, noise, [24, 24], SAMPLING)


@pytest.mark.parametrize("temperature", [1e-3, 0.0])
def test_a_cold_model_is_greedy(temperature: float, tiny_llama: LlamaForCausalLM) -> None:
    (prompt,), cold = prompts_of(6), Sampling(vocabulary=259, stop=frozenset({STOP}), temperature=temperature)
    (found,) = generate([(1.0, tiny_llama)], [prompt], noise_of(1), [12], cold)
    greedy = tiny_llama.generate(prompt[None], attention_mask=torch.ones(1, 6), max_new_tokens=12, do_sample=False)
    assert found == greedy[0, 6:].tolist()


def test_ids_that_stand_for_no_token_are_never_drawn(tiny_llama: LlamaForCausalLM) -> None:
    few = Sampling(vocabulary=40, stop=frozenset())
    found = generate([(1.0, tiny_llama)], prompts_of(4, 4, 4), noise_of(3), [24] * 3, few)
    assert max(max(text) for text in found) < 40


@pytest.mark.parametrize("mode", [True, False])
def test_every_module_is_in_its_own_mode_afterwards(mode: bool, tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train(mode)
    tiny_llama.model.layers[1].train(not mode)
    before = [module.training for module in tiny_llama.modules()]
    generate([(1.0, tiny_llama)], prompts_of(3), noise_of(1), [2], SAMPLING)
    assert [module.training for module in tiny_llama.modules()] == before


def test_activation_checkpointing_and_dropout_change_nothing(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.config.attention_dropout = 0.5
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    asked = ([(1.0, tiny_llama)], prompts_of(5, 2), noise_of(2), [9, 9], SAMPLING)
    plain = generate(*asked)
    tiny_llama.gradient_checkpointing_enable()
    tiny_llama.config.use_cache = False
    assert generate([(1.0, tiny_llama.train())], *asked[1:]) == plain


def test_greedy_answers_are_those_of_the_argmax_step_by_step(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    written = generate_texts(tiny_llama, tiny_tokenizer, prompts[:1], options=GenerationOptions(max_new_tokens=12))
    ids = list(prompts[0])
    for _ in range(12):
        with torch.no_grad():
            ids.append(tiny_llama(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tiny_tokenizer.eos_token_id:
            break
    assert written == [tiny_tokenizer.decode(ids[len(prompts[0]) :], skip_special_tokens=True)]


def test_batches_and_padding_change_no_answer(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    one, three = (
        generate_texts(
            tiny_llama, tiny_tokenizer, prompts, options=GenerationOptions(max_new_tokens=8, batch_size=size)
        )
        for size in (1, 3)
    )
    assert one == three
    assert len(set(one)) > 1


def test_sampling_follows_its_seed_and_leaves_the_global_one_alone(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        generate_texts(
            tiny_llama, tiny_tokenizer, prompts, options=GenerationOptions(max_new_tokens=8, temperature=1.0, seed=seed)
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert first == again != other


def test_an_answer_ends_at_the_stop_token_and_is_not_padded(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    stopping = deepcopy(tiny_llama)
    with torch.no_grad():
        first = stopping(torch.tensor([prompts[0]])).logits[0, -1].argmax().item()
    stopping.generation_config.eos_token_id = first
    texts = generate_texts(stopping, tiny_tokenizer, prompts, options=GenerationOptions(max_new_tokens=8))
    assert texts[0] == tiny_tokenizer.decode([first])
    assert any(len(text) > len(texts[0]) for text in texts)


def test_sampled_answers_do_not_depend_on_the_batch(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    alone, together = (
        generate_texts(
            tiny_llama.double(),
            tiny_tokenizer,
            prompts,
            options=GenerationOptions(max_new_tokens=8, temperature=1.0, batch_size=size),
        )
        for size in (1, 4)
    )
    assert alone == together


def test_every_token_of_a_list_in_the_generation_config_ends_an_answer(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    options = GenerationOptions(max_new_tokens=8)
    first, second = (
        tiny_llama(torch.tensor([prompt])).logits[0, -1].argmax().item() for prompt in (prompts[0], prompts[1])
    )
    assert first != second
    tiny_llama.generation_config.eos_token_id = [first, second]
    texts = generate_texts(tiny_llama, tiny_tokenizer, prompts[:2], options=options)
    assert texts == [tiny_tokenizer.decode([token]) for token in (first, second)]


def test_a_model_without_a_cache_writes_the_same_by_reading_the_text_again(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ([(1.0, tiny_llama.double())], prompts_of(5, 2), noise_of(2), [9, 5], SAMPLING)
    expected = generate([(1.0, deepcopy(tiny_llama))], *asked[1:])
    forward, lengths = tiny_llama.model.forward, []

    def forget(input_ids: torch.Tensor, **inputs: Any) -> Any:
        lengths.append(input_ids.shape[1])
        outputs = forward(input_ids=input_ids, **inputs | {"past_key_values": None})
        outputs.past_key_values = None
        return outputs

    monkeypatch.setattr(tiny_llama.model, "forward", forget)
    ModelRunner(tiny_llama, vocabulary=259)  # its short forwards are over before the lengths count
    lengths.clear()
    assert generate(*asked) == expected
    assert lengths[:6] == [5, 2, 6, 3, 7, 4]
