"""Requests as clients really send them, to the application in this process: an answer or status 400, never 500."""

import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.serving import load_tiny, open_client
from transformers import GenerationConfig

from potstill.serve.request import ChatCompletionRequest, CompletionRequest, GenerationRequest
from potstill.serve.server import choose_sampling_defaults

CHAT = [{"role": "user", "content": "a wash"}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with open_client() as client:
        yield client


def post(client: TestClient, route: str = "/v1/completions", **body: Any) -> Any:
    prompt = {"messages": CHAT} if "chat" in route else {"prompt": "a wash"}
    content = json.dumps({**prompt, "max_tokens": 2, **body}).encode()
    return client.post(route, content=content, headers={"content-type": "application/json"})


NO_OPS: dict[str, list[Any]] = {
    "n": [1, None],
    "min_tokens": [0, None],
    "response_format": [{"type": "text"}, None],
    "best_of": [1, None],
    "top_p": [1, 1.0, None],
    "top_k": [-1, 0, None],
    "min_p": [0, None],
    "repetition_penalty": [1, None],
    "frequency_penalty": [0, 0.0, None],
    "presence_penalty": [0, None],
    "stop": [None, []],
    "logit_bias": [None, {}],
    "suffix": [None, ""],
    "echo": [False, None],
    "stream": [False, None],
    "stream_options": [None],
    "logprobs": [None],
    "seed": [None],
    "temperature": [None],
    "user": ["someone", None],
    "store": [True],
    "metadata": [{"a": "b"}],
}


def test_the_defaults_of_clients_change_nothing(client: TestClient) -> None:
    plain = post(client, temperature=0).json()["choices"]
    for name, values in NO_OPS.items():
        for value in values:
            answer = post(client, **{"temperature": 0, name: value})
            assert answer.status_code == 200, (name, value, answer.text)
            assert name == "temperature" or answer.json()["choices"] == plain
    everything = {name: values[0] for name, values in NO_OPS.items()} | {"temperature": 0}
    assert post(client, **everything).json()["choices"] == plain


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param({"prompt": "a\ud83d"}, "prompt", id="half a character"),
        pytest.param({"prompt": ["a", "\udc00b"]}, "", id="half a character in a list"),
        pytest.param({"model": "\ud83d"}, "", id="a name of half a character"),
        pytest.param({"\ud83d": 1}, "", id="a field of half a character"),
        pytest.param({"prompt": [5, 259]}, "the id 259", id="an id of padding"),
        pytest.param({"prompt": [5, 10**30]}, "", id="an id beyond every integer"),
        pytest.param({"prompt_logprobs": -1}, "--max-logprobs", id="the whole vocabulary"),
        pytest.param({"prompt_logprobs": 21}, "at most|maximum allowed is 20", id="more than vLLM gives"),
        pytest.param({"logprobs": 21}, "maximum allowed is 20", id="more of the answer"),
        pytest.param({"n": 129}, "n:", id="too many answers"),
        pytest.param({"n": 100}, "--max-queue", id="more answers than the server takes"),
        pytest.param({"prompt": ["a"] * 100}, "--max-queue", id="more prompts than the server takes"),
        pytest.param({"stop": [""]}, "stop", id="an empty stop string"),
        pytest.param({"stop": ["x"] * 17}, "stop", id="too many stop strings"),
        pytest.param({"stream_options": {}}, "stream", id="options of a stream without one"),
        pytest.param({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", id="scores in a stream"),
        pytest.param({"response_format": {"type": "json_object"}}, "response_format", id="JSON"),
        pytest.param({"min_tokens": 3}, "min_tokens", id="a least number of tokens"),
        pytest.param({"frequency_penalty": 0.5}, "frequency_penalty", id="a penalty"),
        pytest.param({"top_p": 0}, "top_p", id="no tokens"),
        pytest.param({"max_tokens": 10**30}, "context", id="an endless answer"),
        pytest.param({"repetition_penalty": 0}, "repetition_penalty", id="no penalty at all"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(client: TestClient, body: dict[str, Any], message: str) -> None:
    refuses(post(client, **body), message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param({"messages": []}, "messages", id="no message"),
        pytest.param({"messages": [{"content": "a"}]}, "messages", id="no role"),
        pytest.param({"messages": [{"role": "user", "content": "a\udc00"}]}, "surrogate", id="half a character"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "messages",
            id="an image",
        ),
        pytest.param({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice", id="tools"),
        pytest.param({"tool_choice": "required"}, "tool_choice", id="a tool call"),
        pytest.param({"top_logprobs": 2}, "logprobs", id="likeliest tokens without log-probabilities"),
        pytest.param({"logprobs": True, "top_logprobs": 21}, "maximum allowed is 20", id="too many of them"),
        pytest.param({"max_completion_tokens": 0}, "max_completion_tokens", id="no answer"),
        pytest.param({"messages": [{"role": "user", "content": "a" * 300}]}, "context", id="a long chat"),
        pytest.param({"continue_final_message": True}, "continue_final_message", id="half an answer"),
        pytest.param(
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "JSON",
            id="arguments that are no JSON",
        ),
    ],
)
def test_a_chat_that_cannot_be_answered_is_a_bad_request(
    client: TestClient, body: dict[str, Any], message: str
) -> None:
    refuses(post(client, "/v1/chat/completions", **body), message)


def refuses(answer: Any, message: str) -> None:
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["code"] == answer.status_code
    assert any(part in error["message"] for part in message.split("|"))


def test_no_body_is_answered_with_status_500(client: TestClient) -> None:
    values: list[Any] = [None, True, -1, 0, 7, 5e-324, 1e308, 2**70, "", "\ud800", [], {}, [[]], [258], ["a", 1]]
    values += [{"5": 1}, float("nan"), 10**400]
    fields = {
        "/v1/completions": [*CompletionRequest.model_fields, "unknown"],
        "/v1/chat/completions": set(ChatCompletionRequest.model_fields) - set(GenerationRequest.model_fields),
    }
    for route, names in fields.items():
        for name, value in itertools.product(names, values):
            answer = post(client, route, **{"temperature": 1, "seed": 1, "max_tokens": 1, name: value})
            assert answer.status_code in (200, 400, 404), (name, value, answer.text)
    for content in (b"", b"[]", b"null", b"{", b"\xff", b"1", b'{"prompt": ' + b"[" * 3000):
        answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, content
        assert answer.json()["error"]["code"] == 400
    assert client.get("/v1/nothing").json()["error"]["code"] == 404


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(client: TestClient, temperature: float) -> None:
    greedy, near = (post(client, temperature=t, max_tokens=8).json()["choices"] for t in (0, temperature))
    assert near == greedy


def test_an_unknown_field_is_ignored_and_noted_once(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="potstill"):
        for _ in range(2):
            assert post(client, dream=1).status_code == 200
    assert caplog.text.count("'dream'") == 1


def test_a_limit_of_log_probabilities_is_the_servers_to_set() -> None:
    with open_client(max_logprobs=-1) as client:
        known = post(client, prompt_logprobs=-1).json()["choices"][0]["prompt_logprobs"][1]
        assert len(known) == 259
    with open_client(max_logprobs=0) as client:
        assert post(client, logprobs=0).status_code == 200
        assert post(client, logprobs=1).status_code == 400


def test_requests_sample_with_the_defaults_of_the_generation_config_and_are_greedy_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded = load_tiny()
    loaded.model.generation_config = GenerationConfig(do_sample=True, temperature=1.5, top_k=1, repetition_penalty=9.0)
    with caplog.at_level(logging.WARNING, logger="potstill"):
        defaults = choose_sampling_defaults(loaded)
    assert "temperature 1.5, top_k 1, repetition_penalty 9" in caplog.text
    assert "--ignore-generation-config" in caplog.text
    request = {"max_tokens": 12, "seed": 3}

    def write(client: TestClient, **body: Any) -> str:
        return str(post(client, **request, **body).json()["choices"][0]["text"])

    all_named = {"temperature": 1.5, "top_k": 1, "repetition_penalty": 9.0}
    with open_client(sampling_defaults=defaults) as with_defaults, open_client() as plain:
        assert write(with_defaults) == write(plain, **all_named) != write(plain)
        assert write(with_defaults, temperature=1, top_k=-1, repetition_penalty=1) == write(plain, temperature=1)
        assert write(with_defaults, temperature=0) == write(plain, temperature=0)
        assert write(plain, temperature=0, repetition_penalty=9.0) != write(plain, temperature=0)
