"""Requests as clients really send them, to the application in this process: an answer or status 400, never 500."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from tests.tiny import byte_tokenizer, random_llama
from transformers import GenerationConfig

from potstill.models.load import LoadedModel
from potstill.serve import completion
from potstill.serve.app import choose_sampling_defaults, create_app

PADDED = 300  # rows of the embedding; the tokenizer has 259 ids


def make_client(**options: Any) -> TestClient:
    app = create_app(load(), name="tiny", **options)
    return TestClient(app, raise_server_exceptions=False)


def load() -> LoadedModel:
    tokenizer = byte_tokenizer()
    model = random_llama(tokenizer)
    model.resize_token_embeddings(PADDED, mean_resizing=False)
    return LoadedModel(model, tokenizer, "tiny", Path("tiny"), None, "")


@pytest.fixture(scope="module")
def client() -> TestClient:
    return make_client()


def post(client: TestClient, **body: Any) -> Any:
    content = json.dumps({"prompt": "a wash", "max_tokens": 2, **body}).encode()
    return client.post("/v1/completions", content=content, headers={"content-type": "application/json"})


NO_OPS: dict[str, list[Any]] = {
    "n": [1, None],
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
        pytest.param({"n": 2}, "n:", id="two answers"),
        pytest.param({"stop": ["x"]}, "stop", id="a stop string"),
        pytest.param({"frequency_penalty": 0.5}, "frequency_penalty", id="a penalty"),
        pytest.param({"top_p": 0}, "top_p", id="no tokens"),
        pytest.param({"max_tokens": 10**30}, "context", id="an endless answer"),
        pytest.param({"repetition_penalty": 0}, "repetition_penalty", id="no penalty at all"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(client: TestClient, body: dict[str, Any], message: str) -> None:
    answer = post(client, **body)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["code"] == answer.status_code
    assert any(part in error["message"] for part in message.split("|"))


def test_no_body_is_answered_with_status_500(client: TestClient) -> None:
    values: list[Any] = [None, True, -1, 0, 7, 5e-324, 1e308, 2**70, "", "\ud800", [], {}, [[]], [258], ["a", 1]]
    values += [{"5": 1}, float("nan")]
    names = [*completion.CompletionRequest.model_fields, "tools"]
    for name, value in itertools.product(names, values):
        answer = post(client, **{"temperature": 1, "seed": 1, "max_tokens": 1, name: value})
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


def test_no_more_logits_than_those_of_a_step_or_chunk_exist_at_once(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, sizes = completion.compute_token_logprobs, []

    def record(logits: torch.Tensor, *rest: Any) -> Any:
        sizes.append(len(logits))
        return compute(logits, *rest)

    monkeypatch.setattr(completion, "compute_token_logprobs", record)
    monkeypatch.setattr(completion, "CHUNK_ROWS", 16)
    answer = post(client, prompt="a" * 40, max_tokens=30, temperature=0, logprobs=2, prompt_logprobs=2)
    written = len(answer.json()["choices"][0]["logprobs"]["tokens"])
    assert sizes == [*[1] * written, 16, 16, 7]


def test_a_limit_of_log_probabilities_is_the_servers_to_set() -> None:
    known = post(make_client(max_logprobs=-1), prompt_logprobs=-1).json()["choices"][0]["prompt_logprobs"][1]
    assert len(known) == 259
    assert post(make_client(max_logprobs=0), logprobs=0).status_code == 200
    assert post(make_client(max_logprobs=0), logprobs=1).status_code == 400


def test_requests_sample_with_the_defaults_of_the_generation_config_and_are_greedy_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded = load()
    loaded.model.generation_config = GenerationConfig(do_sample=True, temperature=1.5, top_k=1, repetition_penalty=9.0)
    with caplog.at_level(logging.WARNING, logger="potstill"):
        defaults = choose_sampling_defaults(loaded)
    assert "temperature 1.5, top_k 1, repetition_penalty 9" in caplog.text
    assert "--ignore-generation-config" in caplog.text
    with_defaults, plain = make_client(sampling_defaults=defaults), make_client()
    request = {"max_tokens": 12, "seed": 3}

    def write(client: TestClient, **body: Any) -> str:
        return str(post(client, **request, **body).json()["choices"][0]["text"])

    all_named = {"temperature": 1.5, "top_k": 1, "repetition_penalty": 9.0}
    assert write(with_defaults) == write(plain, **all_named) != write(plain)
    assert write(with_defaults, temperature=1, top_k=-1, repetition_penalty=1) == write(plain, temperature=1)
    assert write(with_defaults, temperature=0) == write(plain, temperature=0)
    assert write(plain, temperature=0, repetition_penalty=9.0) != write(plain, temperature=0)
