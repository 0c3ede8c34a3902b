"""What the server refuses, cuts or frees: a full queue, a client that leaves, a body, a host, a key, a time-out."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from tests.serving import ThreadServer, load_tiny, open_client, serving_in_thread, wait_for

from potstill.core.errors import UsageError
from potstill.serve import guard
from potstill.serve.guard import get_host_name
from potstill.serve.options import ServeLimits
from potstill.serve.served_model import choose_context

LONG = {"prompt": "a wash", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
SHORT = {**LONG, "max_tokens": 2}


@pytest.fixture
def slow_server() -> Iterator[ThreadServer]:
    """One slot, one place in the queue, and at most 100 tokens per second."""
    with serving_in_thread(slots=1, max_queue=1, step_seconds=0.01) as server:
        yield server


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A client of a server with a key, a small body limit and a name of its own."""
    options: dict[str, Any] = {"api_key": "secret", "max_body": 1000, "allowed_hosts": ("model.example",)}
    with open_client(**options) as client:
        client.headers["authorization"] = "Bearer secret"
        yield client


def read_metric(server: ThreadServer, name: str) -> float:
    """The value of a metric."""
    lines = httpx.get(f"{server.root}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"potstill:{name}{{"))


@contextmanager
def open_stream(server: ThreadServer, body: dict[str, Any] = LONG) -> Iterator[Iterator[str]]:
    """The lines of a stream after the first one, which has come; its end closes the connection."""
    with (
        httpx.Client() as client,
        client.stream("POST", f"{server.url}/completions", json={**body, "stream": True}) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()
        next(lines)
        yield lines


def test_a_full_queue_is_answered_with_429_and_the_next_request_after_it_with_200(slow_server: ThreadServer) -> None:
    url = f"{slow_server.url}/completions"
    waiting = threading.Thread(target=httpx.post, args=(url,), kwargs={"json": SHORT})
    with open_stream(slow_server):
        waiting.start()
        wait_for(lambda: slow_server.served.worker.num_answers == 2)
        assert [read_metric(slow_server, f"num_requests_{name}") for name in ("running", "waiting")] == [1, 1]
        busy = httpx.post(url, json=SHORT)
    assert busy.status_code == 429
    assert 1 <= int(busy.headers["retry-after"]) <= 30
    assert "try again" in busy.json()["error"]["message"]
    assert read_metric(slow_server, "requests_rejected_total") == 1
    waiting.join()
    assert httpx.post(url, json=SHORT).status_code == 200


@pytest.mark.parametrize("streams", [True, False], ids=["a stream", "a whole answer"])
def test_a_client_that_leaves_frees_its_slot(slow_server: ThreadServer, streams: bool) -> None:
    if streams:
        with open_stream(slow_server):
            pass
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{slow_server.url}/completions", json=LONG, timeout=0.2)
    slow_server.wait_until_idle()
    assert read_metric(slow_server, "num_requests_running") == 0
    assert read_metric(slow_server, "generation_tokens_total") < 150
    assert read_metric(slow_server, "request_success_total") == 1
    assert httpx.post(f"{slow_server.url}/completions", json=SHORT).status_code == 200


def test_an_answer_that_takes_too_long_is_an_error_and_frees_its_slot() -> None:
    with serving_in_thread(step_seconds=0.02, timeout=0.2) as server:
        answer = httpx.post(f"{server.url}/completions", json=LONG)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "false")
        assert "--timeout" in answer.json()["error"]["message"]
        *_, error, done = httpx.post(f"{server.url}/completions", json={**LONG, "stream": True}).text.split("\n\n")[:-1]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 408
        assert done == "data: [DONE]"
        server.wait_until_idle()


def test_a_stopped_server_cuts_running_answers_and_refuses_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.serve.server.GRACE_SECONDS", 0.1)
    lines: list[str] = []
    with ExitStack() as stack:
        with serving_in_thread(step_seconds=0.05) as server:
            rest = stack.enter_context(open_stream(server))
            reader = threading.Thread(target=lambda: lines.extend(rest))
            reader.start()
            begin = time.monotonic()
        assert time.monotonic() - begin < 8
        reader.join()
    *_, last, done = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
    assert done == "data: [DONE]"


def test_a_body_beyond_the_limit_is_refused_whether_its_length_is_announced_or_not(client: TestClient) -> None:
    announced = client.post("/v1/completions", json={"prompt": "a" * 1000})
    chunks = iter([b'{"prompt": "', b"a" * 900, b"a" * 900, b'"}'])
    sent = client.post("/v1/completions", content=chunks, headers={"content-type": "application/json"})
    for answer in (announced, sent):
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "RequestTooLargeError")
        assert "--max-body" in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_a_body_that_does_not_arrive_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.serve.app.BODY_SECONDS", 0.2)
    assert guard.BODY_SECONDS == 30
    with serving_in_thread() as server:

        async def send_half() -> bytes:
            host, port = server.root.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: 100\r\n\r\n{{".encode())
            status = await asyncio.wait_for(reader.readline(), 10)
            writer.close()
            return status

        assert b" 408 " in asyncio.run(send_half())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("192.168.7.7:80", 200),
        ("model.example", 200),
        ("MODEL.example:80", 200),
        ("attacker.example", 403),
        ("localhost.attacker.example", 403),
        ("", 403),
    ],
)
def test_only_hosts_that_are_this_machine_are_answered(client: TestClient, host: str, status: int) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == status


def test_a_host_is_read_without_its_port() -> None:
    names = {"A:1": "a", "[::1]:80": "::1", "[::1]": "::1", "a.b": "a.b", "": ""}
    assert {header: get_host_name(header) for header in names} == names


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/models", "", 401),
        ("/v1/models", "Bearer wrong", 401),
        ("/v1/models", "secret", 401),
        ("/v1/models", "Bearer secret", 200),
        ("/v1/models", "bearer secret", 200),
        ("/health", "", 200),
        ("/metrics", "", 200),
        ("/", "", 200),
    ],
)
def test_a_key_is_wanted_below_v1_alone(client: TestClient, path: str, key: str, status: int) -> None:
    assert client.get(path, headers={"authorization": key}).status_code == status
    assert "secret" not in client.get("/openapi.json").text


def test_a_form_of_another_page_is_no_request(client: TestClient) -> None:
    body = json.dumps(SHORT)
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"content-type": content_type} if content_type else {}
        assert client.post("/v1/completions", content=body, headers=headers).status_code == 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "--slots"),
        ({"max_queue": -1}, "--max-queue"),
        ({"context": 1}, "--context"),
        ({"max_logprobs": -2}, "-1 for no limit"),
        ({"timeout": 0.0}, "--timeout"),
        ({"timeout": float("nan")}, "--timeout"),
    ],
)
def test_limits_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServeLimits(**options)


def test_a_context_above_the_models_is_refused() -> None:
    with pytest.raises(UsageError, match="--context is 257"):
        choose_context(load_tiny(), 257)
