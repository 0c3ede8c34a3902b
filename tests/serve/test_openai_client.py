"""OpenAI's own client: both endpoints, whole and streamed, and many clients at once."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.serving import ThreadServer, serving_in_thread

CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a wash?"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadServer]:
    with serving_in_thread(slots=8, max_queue=100, context=256) as server:
        yield server


@pytest.fixture
def client(server: ThreadServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    options = {**GREEDY, "prompt": "the still boils", "logprobs": 2, "echo": True, "n": 2}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            pieces = [value for part in parts if part.logprobs for value in getattr(part.logprobs, name)]
            expected = getattr(choice.logprobs, name)
            if name == "token_logprobs":
                assert pieces[0] is expected[0] is None
                pieces, expected = pieces[1:], pytest.approx(expected[1:], abs=1e-5)
            assert name == "top_logprobs" or pieces == expected
            assert len(pieces) >= 24


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    options = {**GREEDY, "messages": CHAT, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    (choice,) = whole.choices
    parts = [part for chunk in chunks for part in chunk.choices]
    assert parts[0].delta.role == choice.message.role == "assistant"
    assert "".join(part.delta.content or "" for part in parts) == choice.message.content
    assert parts[-1].finish_reason == choice.finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    streamed = [entry for part in parts if part.logprobs for entry in part.logprobs.content or []]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert len(entries) == whole.usage.completion_tokens == 24  # type: ignore[union-attr]
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert bytes(entry.bytes or []).decode(errors="replace") == entry.token


def test_a_seed_decides_the_answer_and_choices_differ(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {**GREEDY, "temperature": 1.2, "messages": CHAT, "n": 2}
    texts = [
        [choice.message.content for choice in client.chat.completions.create(**options, seed=seed).choices]
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 3
    assert texts[0][1] == texts[2][0]  # choice i has the seed `seed + i`


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(**GREEDY, prompt="the still boils").choices[0].text
    stop = whole[8:11]
    cut = client.completions.create(**GREEDY, prompt="the still boils", stop=[stop, "no such text"]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.stop_reason == stop  # type: ignore[attr-defined]
    pieces = [
        part.text
        for chunk in client.completions.create(**GREEDY, prompt="the still boils", stop=stop, stream=True)
        for part in chunk.choices
    ]
    assert "".join(pieces) == cut.text


def test_tokens_that_end_an_answer_are_the_requests_to_choose(client: openai.OpenAI) -> None:
    options = {**GREEDY, "prompt": "the still boils", "logprobs": 0}
    free = client.completions.create(**options, extra_body={"ignore_eos": True}).choices[0]
    assert free.finish_reason == "length"
    assert free.logprobs is not None
    first = client.completions.create(
        **{**options, "max_tokens": 1}, extra_body={"return_tokens_as_token_ids": None, "ignore_eos": True}
    )
    assert first.choices[0].finish_reason == "length"
    ids = list(range(259))
    ended = client.completions.create(**options, extra_body={"stop_token_ids": ids}).choices[0]
    assert (ended.finish_reason, len((ended.logprobs or free.logprobs).tokens or [])) == ("stop", 1)


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.chat.completions.create(model="other", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(**{**GREEDY, "max_tokens": 10_000}, messages=CHAT)


def test_the_model_is_listed_with_its_context(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 256)  # type: ignore[attr-defined]


def test_many_clients_at_once_get_the_answers_that_each_gets_alone(server: ThreadServer, client: openai.OpenAI) -> None:
    options = {**GREEDY, "max_tokens": 12}
    prompts = [f"{'the still boils a wash ' * (number % 4)}{number}" for number in range(12)]
    alone = [client.completions.create(**options, prompt=prompt).choices[0].text for prompt in prompts]

    async def write_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as many:

            async def write(prompt: str) -> str:
                stream = await many.completions.create(**options, prompt=prompt, stream=True)
                return "".join([part.text async for chunk in stream for part in chunk.choices])

            return await asyncio.gather(*map(write, prompts * 4))

    assert asyncio.run(write_all()) == alone * 4
    server.wait_until_idle()
