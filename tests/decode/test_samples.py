"""Samples of one prompt, which is read once, are those of single requests, for every kind of memory."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.decode.families import make_model
from tests.decode.test_engine import GREEDY, SAMPLED
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from potstill.core.errors import UsageError
from potstill.decode.drafters.options import DraftOptions
from potstill.decode.drafters.registry import make_speculation
from potstill.decode.engine import Engine
from potstill.decode.generate import generate, generate_samples, make_noise
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling

WARM = Sampling(vocabulary=97, stop=frozenset({2}), temperature=0.8)
PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 7, 8, 9, 10], [11], [12, 13, 14])]


def draw_singly(model: PreTrainedModel, noise: Tensor, sampling: Sampling) -> list[list[int]]:
    """The samples as requests of their own, each of which reads its prompt."""
    prompts = [prompt for prompt in PROMPTS for _ in range(noise.shape[1])]
    limits = [noise.shape[2]] * len(prompts)
    return generate([(1.0, model)], prompts, noise.flatten(0, 1), limits, sampling)


def draw_together(model: PreTrainedModel, noise: Tensor, sampling: Sampling, *, slots: int = 24) -> list[list[int]]:
    samples = generate_samples(model, PROMPTS, noise, noise.shape[2], sampling, slots=slots)
    return [sample.tokens for group in samples for sample in group]


@pytest.mark.parametrize("family", ["potstill", "deltanet", "depths", "bloom"])
def test_samples_of_a_prompt_that_is_read_once_are_those_of_single_requests(family: str) -> None:
    model, noise = make_model(family), torch.rand(3, 3, 5)
    expected = draw_singly(model, noise, WARM)
    assert draw_together(model, noise, WARM, slots=7) == expected
    assert len(set(map(tuple, expected[:3]))) > 1


def test_in_float32_the_same_noise_gives_the_same_tokens(tiny_llama: LlamaForCausalLM) -> None:
    sampling, noise = replace(WARM, vocabulary=259), make_noise(24, 12, seed=4).unflatten(0, (3, 8))
    assert draw_together(tiny_llama, noise, sampling) == draw_singly(tiny_llama, noise, sampling)


def test_the_log_probabilities_of_samples_have_the_temperature_of_the_sampling(tiny_llama: LlamaForCausalLM) -> None:
    sampling = replace(WARM, vocabulary=259, stop=frozenset())
    (samples,) = generate_samples(tiny_llama, PROMPTS[:1], torch.rand(1, 3, 5), 5, sampling)
    for tokens, log_p in samples:
        with torch.no_grad():
            logits = tiny_llama(torch.tensor([[*PROMPTS[0].tolist(), *tokens]])).logits[0, 5:-1]
        expected = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(log_p), expected, rtol=1e-4, atol=1e-4)


def make_requests(prompt: Sequence[int], count: int, sampling: Sampling = GREEDY) -> list[DecodeRequest]:
    return [DecodeRequest(prompt=prompt, max_new_tokens=6, sampling=sampling, seed=n) for n in range(count)]


def make_engine(model: PreTrainedModel, *, slots: int, reuse_prefix: bool = False) -> Engine:
    return Engine(ModelRunner(model, vocabulary=259, slots=slots), reuse_prefix=reuse_prefix)


def test_a_prompt_is_read_once_and_its_samples_wait_until_all_have_a_slot(tiny_llama: LlamaForCausalLM) -> None:
    engine = make_engine(tiny_llama, slots=3)
    engine.add(make_requests([3, 4], 1)[0])
    engine.add_samples(make_requests([5, 6, 7, 8], 3, SAMPLED))
    engine.step()
    assert (engine.num_active, engine.num_queued, engine.stats.prompt_tokens) == (1, 3, 2)
    engine.run()
    assert engine.stats.prompt_tokens == 2 + 4


@pytest.mark.parametrize("cancelled", [0, 1])
@pytest.mark.parametrize("steps", [0, 1])
def test_the_other_samples_go_on_when_one_is_cancelled(
    cancelled: int, steps: int, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.decode.engine.PROMPT_TOKENS", 64)  # the prompt takes two steps
    engine, requests = make_engine(tiny_llama, slots=3), make_requests(list(range(10, 110)), 3, SAMPLED)
    request_ids = engine.add_samples(requests)
    for _ in range(steps):
        engine.step()
    engine.cancel(request_ids[cancelled])
    completions = engine.run()
    assert completions[request_ids[cancelled]].finish_reason == "cancelled"
    for request_id, request in zip(request_ids, requests, strict=True):
        if request_id != request_ids[cancelled]:
            assert completions[request_id].tokens == run_alone(make_engine(tiny_llama, slots=1), request)


def run_alone(engine: Engine, request: DecodeRequest) -> list[int]:
    request_id = engine.add(request)
    return engine.run()[request_id].tokens


def test_samples_take_slots_that_kept_another_text(tiny_llama: LlamaForCausalLM) -> None:
    engine, requests = make_engine(tiny_llama, slots=3, reuse_prefix=True), make_requests([5, 6, 7], 3, SAMPLED)
    expected = [run_alone(make_engine(tiny_llama, slots=1), request) for request in requests]
    for _ in range(2):
        request_ids = engine.add_samples(requests)
        completions = engine.run()
        assert [completions[request_id].tokens for request_id in request_ids] == expected


@pytest.mark.parametrize("draft", ["lookup", "exit:2"])
def test_a_draft_writes_the_same_samples(
    draft: str, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def make_drafting_engine() -> Engine:
        runner = ModelRunner(tiny_llama, vocabulary=259, slots=3)
        options = DraftOptions(draft=draft, draft_length="4")
        return Engine(runner, tiny_tokenizer, speculation=make_speculation(runner, tiny_tokenizer, options))

    requests = [replace(request, max_new_tokens=20) for request in make_requests([5, 6, 7, 5, 6], 3, SAMPLED)]
    engine = make_drafting_engine()
    request_ids = engine.add_samples(requests)
    completions = engine.run()
    for request_id, request in zip(request_ids, requests, strict=True):
        assert completions[request_id].tokens == run_alone(make_drafting_engine(), request)


def test_samples_of_different_prompts_or_of_more_than_the_slots_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    engine = make_engine(tiny_llama, slots=2)
    with pytest.raises(UsageError, match="different values of prompt;"):
        engine.add_samples([*make_requests([5, 6], 1), *make_requests([5, 7], 1)])
    first, second = make_requests([5, 6], 2)
    with pytest.raises(UsageError, match="different values of prompt_logprobs; add the requests one by one"):
        engine.add_samples([first, replace(second, prompt_logprobs=2)])
    with pytest.raises(UsageError, match="3 samples of a prompt do not fit in 2 slots"):
        engine.add_samples(make_requests([5, 6], 3))
