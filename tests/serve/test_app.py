"""The server as strangers meet it: over HTTP, in the shapes of OpenAI's legacy endpoint and of vLLM."""

import json
import math
import signal
import socket
import sys
from typing import Any

import httpx
import pytest
import torch
from tests.serving import Server, serving
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import MissingDependency, UsageError
from potstill.serve.options import ServeOptions
from potstill.serve.server import open_socket, serve

TEXT = "the still boils a wash"


@pytest.fixture
def post(server: Server) -> Any:
    """The answer to a request for completions."""

    def call(**body: Any) -> httpx.Response:
        return httpx.post(f"{server.url}/completions", json=body, timeout=30)

    return call


@pytest.fixture
def choice(post: Any) -> Any:
    """The one choice of a request that goes well."""

    def call(**body: Any) -> Any:
        answer = post(**body)
        assert answer.status_code == 200, answer.text
        (one,) = answer.json()["choices"]
        return one

    return call


@pytest.fixture
def log_p(tiny_llama: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """What the model says of `ids`, in this process."""
    with torch.no_grad():
        return tiny_llama(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.fixture
def ids(tiny_tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return list(tiny_tokenizer(TEXT).input_ids)


def test_the_one_model_is_listed(server: Server) -> None:
    found = httpx.get(f"{server.url}/models").json()
    assert found["object"] == "list"
    assert [(one["id"], one["object"]) for one in found["data"]] == [(str(server.model), "model")]


def test_an_answer_has_the_shape_that_clients_know(post: Any, server: Server) -> None:
    found = post(prompt=TEXT, max_tokens=4, temperature=0).json()
    assert set(found) == {"id", "object", "created", "model", "choices", "usage"}
    assert (found["object"], found["model"]) == ("text_completion", str(server.model))
    (one,) = found["choices"]
    assert set(one) == {"index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_logprobs"}
    assert one["logprobs"] is one["prompt_logprobs"] is None
    assert found["usage"]["prompt_tokens"] == len(TEXT)
    assert found["usage"]["total_tokens"] == len(TEXT) + found["usage"]["completion_tokens"]


def test_prompt_logprobs_are_the_models_own_by_token_id(
    choice: Any, ids: list[int], log_p: torch.Tensor, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    first, *rest = choice(prompt=ids, max_tokens=0, prompt_logprobs=3)["prompt_logprobs"]
    assert first is None
    assert len(rest) == len(ids) - 1
    for position, (known, actual) in enumerate(zip(rest, ids[1:], strict=True)):
        row = log_p[position]
        assert next(iter(known)) == str(actual)
        assert {int(token) for token in known} == {actual, *row.topk(3).indices.tolist()}
        for token, said in known.items():
            assert said["logprob"] == pytest.approx(row[int(token)].item(), abs=1e-5)
            assert said["rank"] == 1 + int((row > row[int(token)]).sum())
            assert said["decoded_token"] == tiny_tokenizer.decode([int(token)])


def test_all_of_the_vocabulary_sums_to_one(choice: Any, ids: list[int]) -> None:
    for asked in (-1, 259, 10_000):
        for known in choice(prompt=ids, max_tokens=0, prompt_logprobs=asked)["prompt_logprobs"][1:]:
            assert len(known) == 259
            assert sum(math.exp(said["logprob"]) for said in known.values()) == pytest.approx(1, abs=1e-5)


def test_echoed_logprobs_are_the_models_own_in_parallel_lists(
    choice: Any, ids: list[int], log_p: torch.Tensor, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    one = choice(prompt=ids, max_tokens=0, echo=True, logprobs=2)
    assert one["text"] == TEXT
    said = one["logprobs"]
    assert said["tokens"] == list(TEXT)
    assert said["text_offset"] == list(range(len(TEXT)))
    assert said["token_logprobs"][0] is said["top_logprobs"][0] is None
    own = log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert said["token_logprobs"][1:] == pytest.approx(own.tolist(), abs=1e-5)
    for row, known, token in zip(log_p, said["top_logprobs"][1:], TEXT[1:], strict=False):
        likeliest = {tiny_tokenizer.decode([i]) for i in row.topk(2).indices.tolist()}
        assert set(known) == {token, *likeliest}


def test_greedy_writing_is_the_models_own(choice: Any, ids: list[int], tiny_llama: LlamaForCausalLM) -> None:
    one = choice(prompt=ids, max_tokens=5, temperature=0, logprobs=1)
    with torch.no_grad():
        written = tiny_llama.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    assert len(one["logprobs"]["tokens"]) == len(written)
    for known, log in zip(one["logprobs"]["top_logprobs"], one["logprobs"]["token_logprobs"], strict=True):
        assert max(known.values()) == log
    assert one["finish_reason"] == ("stop" if int(written[-1]) == tiny_llama.config.eos_token_id else "length")


def test_echo_puts_the_prompt_before_what_is_written(choice: Any) -> None:
    alone = choice(prompt=TEXT, max_tokens=3, temperature=0, logprobs=0)
    both = choice(prompt=TEXT, max_tokens=3, temperature=0, logprobs=0, echo=True)
    assert both["text"] == TEXT + alone["text"]
    assert both["logprobs"]["tokens"] == [*TEXT, *alone["logprobs"]["tokens"]]
    assert both["logprobs"]["token_logprobs"][len(TEXT) :] == alone["logprobs"]["token_logprobs"]


def test_a_seed_draws_the_same_again_and_another_draws_otherwise(choice: Any) -> None:
    drawn = [choice(prompt=TEXT, max_tokens=12, temperature=1.5, seed=seed)["text"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_list_of_prompts_is_answered_in_order_as_each_alone(post: Any, ids: list[int]) -> None:
    for prompts in ([TEXT, "a wash"], [ids, ids[3:9]]):
        many = post(prompt=prompts, max_tokens=3, temperature=0, prompt_logprobs=2).json()["choices"]
        assert [one.pop("index") for one in many] == [0, 1]
        for one, prompt in zip(many, prompts, strict=True):
            (alone,) = post(prompt=prompt, max_tokens=3, temperature=0, prompt_logprobs=2).json()["choices"]
            assert one["text"] == alone["text"]
            assert [k and list(k) for k in one["prompt_logprobs"]] == [k and list(k) for k in alone["prompt_logprobs"]]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        pytest.param({}, 400, "prompt: Field required", id="no prompt"),
        pytest.param({"prompt": ""}, 400, "no token", id="an empty prompt"),
        pytest.param({"prompt": []}, 400, "no token", id="no ids"),
        pytest.param({"prompt": [[5], []]}, 400, "no token", id="one empty prompt of two"),
        pytest.param({"prompt": [5, 259]}, 400, "id 259", id="an id that is none"),
        pytest.param({"prompt": [5, -1]}, 400, "prompt", id="an id below zero"),
        pytest.param({"prompt": "a" * 600, "max_tokens": 1}, 400, "512 tokens", id="longer than the context"),
        pytest.param({"prompt": "a", "max_tokens": -1}, 400, "max_tokens", id="fewer than no tokens"),
        pytest.param({"prompt": "a", "temperature": -1}, 400, "temperature", id="below greedy"),
        pytest.param({"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias", id="what this server cannot do"),
        pytest.param({"prompt": "a", "prompt_logprobs": -2}, 400, "prompt_logprobs", id="fewer than all"),
        pytest.param({"prompt": "a", "model": "hope"}, 404, "'hope' does not exist", id="another model"),
    ],
)
def test_a_bad_request_gets_an_error_in_openais_shape(post: Any, body: dict[str, Any], code: int, said: str) -> None:
    answer = post(**body)
    assert answer.status_code == code
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["code"] == code
    assert {"type", "param"} < set(error)


def test_a_body_that_is_no_json_is_a_bad_request(server: Server) -> None:
    answer = httpx.post(f"{server.url}/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "the body" in answer.json()["error"]["message"]


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="is in use"):
        open_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError, match="99999"):
        open_socket("127.0.0.1", 99_999)


def test_without_its_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingDependency, match=r"pip install 'potstill\[serve\]'"):
        serve("anything", ServeOptions(port=0))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_server_ends_quietly_within_seconds(server: Server, number: signal.Signals) -> None:
    with serving(server.model) as one, httpx.Client() as client:
        body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}
        with client.stream("POST", f"{one.url}/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            one.process.send_signal(number)
            *_, last, done = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "abort")
        assert done == "data: [DONE]"
        out, err = one.process.communicate(timeout=90)  # an end takes a second, and more on a loaded machine
        assert one.process.returncode == 130
        assert out == ""
        assert err.startswith("stopped")
        assert "Traceback" not in err
