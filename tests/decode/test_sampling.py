"""What is written in one batch with a cache is what each prompt alone, read anew for every token, would give."""

from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaForCausalLM

from potstill.decode.sampling import Sampling, complete, pad_left, sample_tokens

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
    found = complete([(1.0, model)], prompts, noise, limits, how)
    expected = [alone([(1.0, model)], prompt, u, n, how) for prompt, u, n in zip(prompts, noise, limits, strict=True)]
    assert found == expected
    assert any(len(text) < limit for text, limit in zip(found, limits, strict=True))  # some ended
    assert any(text[-1] != STOP for text in found)  # some were cut


def test_two_voices_write_from_the_mixture_of_what_they_say(tiny_llama: LlamaForCausalLM) -> None:
    model = often_stopping(tiny_llama)
    other = LlamaForCausalLM(model.config).double().eval()
    voices, prompts, noise = [(0.2, other), (0.8, model)], prompts_of(3, 8), noise_of(2)
    found = complete(voices, prompts, noise, [24, 24], SAMPLING)
    assert found == [alone(voices, prompt, u, 24, SAMPLING) for prompt, u in zip(prompts, noise, strict=True)]
    assert found != complete([(1.0, model)], prompts, noise, [24, 24], SAMPLING)


def test_even_noise_draws_each_token_as_often_as_it_is_likely() -> None:
    likely = torch.tensor([0.125, 0.0, 0.5, 0.375], dtype=torch.float64)
    noise = (torch.arange(800) + 0.5) / 800
    drawn = sample_tokens(likely.expand(800, 4), noise)
    assert torch.bincount(drawn, minlength=4).tolist() == [100, 0, 400, 300]
    assert sample_tokens(likely[None], torch.tensor([0.0])).tolist() == [0]
    assert sample_tokens(likely[None], torch.tensor([1 - 1e-9], dtype=torch.float64)).tolist() == [3]


@pytest.mark.parametrize("temperature", [1e-3, 0.0])
def test_a_cold_model_is_greedy(temperature: float, tiny_llama: LlamaForCausalLM) -> None:
    (prompt,), cold = prompts_of(6), Sampling(vocabulary=259, stop=frozenset({STOP}), temperature=temperature)
    (found,) = complete([(1.0, tiny_llama)], [prompt], noise_of(1), [12], cold)
    greedy = tiny_llama.generate(prompt[None], attention_mask=torch.ones(1, 6), max_new_tokens=12, do_sample=False)
    assert found == greedy[0, 6:].tolist()


def test_ids_that_stand_for_no_token_are_never_drawn(tiny_llama: LlamaForCausalLM) -> None:
    few = Sampling(vocabulary=40, stop=frozenset())
    found = complete([(1.0, tiny_llama)], prompts_of(4, 4, 4), noise_of(3), [24] * 3, few)
    assert max(max(text) for text in found) < 40


@pytest.mark.parametrize("mode", [True, False])
def test_every_module_is_in_its_own_mode_afterwards(mode: bool, tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train(mode)
    tiny_llama.model.layers[1].train(not mode)
    before = [module.training for module in tiny_llama.modules()]
    complete([(1.0, tiny_llama)], prompts_of(3), noise_of(1), [2], SAMPLING)
    assert [module.training for module in tiny_llama.modules()] == before


def test_activation_checkpointing_and_dropout_change_nothing(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.config.attention_dropout = 0.5
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    asked = ([(1.0, tiny_llama)], prompts_of(5, 2), noise_of(2), [9, 9], SAMPLING)
    plain = complete(*asked)
    tiny_llama.gradient_checkpointing_enable()
    tiny_llama.config.use_cache = False
    assert complete([(1.0, tiny_llama.train())], *asked[1:]) == plain


def test_prompts_end_in_the_last_column() -> None:
    ids, real = pad_left([torch.tensor([5]), torch.tensor([6, 7, 8])])
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert real.tolist() == [[False, False, True], [True, True, True]]
