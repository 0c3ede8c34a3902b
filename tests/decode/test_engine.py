"""The loop gives each text what it would get alone, ends it where it must, and tells every token once."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.decode.families import ROWS, make_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import UsageError
from potstill.decode.engine import Engine
from potstill.decode.request import Completion, DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling, SamplingFilters

GREEDY = Sampling(vocabulary=259, stop=frozenset(), temperature=0.0)
FILTERS = SamplingFilters(top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
SAMPLED = Sampling(vocabulary=259, stop=frozenset({2}), temperature=0.8, filters=FILTERS)
LENGTHS = (4, 1, 9, 30, 2, 17, 6)


def make_engine(model: LlamaForCausalLM, tokenizer: Any = None, *, slots: int = 3) -> Engine:
    return Engine(ModelRunner(model, vocabulary=259, slots=slots), tokenizer)


def make_requests(sampling: Sampling, **options: Any) -> list[DecodeRequest]:
    generator = torch.Generator().manual_seed(7)
    return [
        DecodeRequest(
            prompt=torch.randint(3, 250, (length,), generator=generator).tolist(),
            max_new_tokens=5 + 3 * n,
            sampling=sampling,
            seed=n,
            **options,
        )
        for n, length in enumerate(LENGTHS)
    ]


def run(engine: Engine, requests: list[DecodeRequest]) -> list[Completion]:
    ids = [engine.add(request) for request in requests]
    completions = engine.run()
    return [completions[request_id] for request_id in ids]


def test_greedy_texts_in_slots_that_fill_up_again_are_those_of_hugging_face(tiny_llama: LlamaForCausalLM) -> None:
    requests = make_requests(GREEDY)
    completions = run(make_engine(tiny_llama.double()), requests)
    for request, completion in zip(requests, completions, strict=True):
        expected = tiny_llama.generate(
            torch.tensor([request.prompt]),
            attention_mask=torch.ones(1, len(request.prompt)),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
        )[0, len(request.prompt) :]
        assert completion.tokens == expected.tolist()
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_a_text_depends_on_its_seed_and_on_no_other_text(sampling: Sampling, tiny_llama: LlamaForCausalLM) -> None:
    model, requests = tiny_llama.double(), make_requests(sampling)
    alone = [run(make_engine(model, slots=1), [request])[0].tokens for request in requests]
    together = [completion.tokens for completion in run(make_engine(model), requests)]
    backward = [completion.tokens for completion in run(make_engine(model, slots=7), requests[::-1])]
    assert together == alone == backward[::-1]
    other = run(make_engine(model), [replace(request, seed=99) for request in requests])
    assert ([completion.tokens for completion in other] == alone) == (sampling is GREEDY)


def test_a_longer_limit_continues_the_same_text(tiny_llama: LlamaForCausalLM) -> None:
    short = replace(make_requests(SAMPLED)[0], sampling=replace(SAMPLED, stop=frozenset()))
    long = replace(short, max_new_tokens=60)
    first, second = run(make_engine(tiny_llama.double()), [short, long])
    assert second.tokens[: len(first.tokens)] == first.tokens
    assert len(second.tokens) == 60


@pytest.mark.parametrize("family", list(ROWS))
def test_models_that_read_one_text_at_a_time_write_the_same(family: str) -> None:
    model, greedy = make_model(family), replace(GREEDY, vocabulary=97)
    prompts = [[5, 6, 7, 8], [9], [10, 11, 12]]
    engine = Engine(ModelRunner(model, vocabulary=97, slots=2))
    requests = [DecodeRequest(prompt=prompt, max_new_tokens=6, sampling=greedy) for prompt in prompts]
    for prompt, completion in zip(prompts, run(engine, requests), strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert completion.tokens == ids[len(prompt) :]


def test_log_probabilities_are_those_of_the_whole_text(tiny_llama: LlamaForCausalLM) -> None:
    request = replace(make_requests(SAMPLED, num_logprobs=3, prompt_logprobs=2)[3], max_new_tokens=8)
    (completion,) = run(make_engine(tiny_llama), [request])
    ids = [*request.prompt, *completion.tokens]
    with torch.no_grad():
        log_p = tiny_llama(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert completion.prompt_logprobs is not None
    entries = [*completion.prompt_logprobs, *completion.logprobs]
    assert [entry.token for entry in entries] == ids[1:]
    for entry, row in zip(entries, log_p, strict=False):
        assert math.isclose(entry.log_p, float(row[entry.token]), abs_tol=1e-4)
        assert entry.rank == 1 + int((row > row[entry.token]).sum())
    assert [len(entry.top_logprobs) for entry in entries] == [2] * (len(request.prompt) - 1) + [3] * 8


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    request = replace(make_requests(GREEDY)[3], max_new_tokens=40)
    (plain,) = run(make_engine(tiny_llama, tiny_tokenizer), [request])
    stop = plain.text[5:8]
    assert len(stop) == 3
    (ended,) = run(make_engine(tiny_llama, tiny_tokenizer), [replace(request, stop_strings=[stop])])
    assert (ended.text, ended.finish_reason) == (plain.text[: plain.text.index(stop)], "stop")
    assert ended.stop_string == stop
    assert ended.tokens == plain.tokens[: len(ended.tokens)]


def test_events_stream_each_token_and_the_last_one_says_why(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    engine, requests = make_engine(tiny_llama, tiny_tokenizer), make_requests(SAMPLED)
    ids = [engine.add(request) for request in requests]
    events = []
    while engine.has_work:
        assert engine.num_active <= 3
        events += engine.step()
    for request_id in ids:
        own = [event for event in events if event.request_id == request_id]
        assert [event.finish_reason is None for event in own] == [True] * (len(own) - 1) + [False]
        tokens = [event.token for event in own]
        assert "".join(event.text for event in own) == tiny_tokenizer.decode(tokens, skip_special_tokens=True)
        assert own[-1].finish_reason == ("stop" if tokens[-1] == 2 else "length")
    assert engine.stats.tokens == sum(event.token is not None for event in events)


def test_a_canceled_request_frees_its_slot(tiny_llama: LlamaForCausalLM) -> None:
    engine, requests = make_engine(tiny_llama, slots=1), make_requests(GREEDY)[:3]
    first, second, third = (engine.add(replace(request, max_new_tokens=6)) for request in requests)
    engine.step()
    engine.cancel(first)
    engine.cancel(second)
    engine.cancel(12345)
    completions = engine.run()
    assert completions[first].finish_reason == completions[second].finish_reason == "cancelled"
    assert not completions[second].tokens
    assert len(completions[third].tokens) == 6
    assert not engine.has_work


def test_no_new_token_gives_the_log_probabilities_of_the_prompt(tiny_llama: LlamaForCausalLM) -> None:
    request = DecodeRequest(prompt=[5, 6, 7], max_new_tokens=0, sampling=GREEDY, prompt_logprobs=1)
    (completion,) = run(make_engine(tiny_llama), [request])
    assert completion.finish_reason == "length"
    assert completion.tokens == []
    assert [entry.token for entry in completion.prompt_logprobs or ()] == [6, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "no token"),
        ({"max_new_tokens": 300}, "3 tokens of prompt and 300 new ones exceed the 256 tokens"),
        ({"stop_strings": ["x"]}, "give the engine a tokenizer"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(
    changes: dict[str, Any], message: str, tiny_llama: LlamaForCausalLM
) -> None:
    request = DecodeRequest(**{"prompt": [5, 6, 7], "max_new_tokens": 5, "sampling": GREEDY, **changes})
    with pytest.raises(UsageError, match=message):
        make_engine(tiny_llama).add(request)
