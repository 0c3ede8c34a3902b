"""The thread of the engine: a failure ends answers and not the server, and the metrics count what happened."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.serving import open_client

BODY = {"prompt": "a wash", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def client() -> Iterator[TestClient]:
    with open_client() as client:
        yield client


def fail_steps(client: Any, monkeypatch: pytest.MonkeyPatch, *, count: int) -> None:
    """The next `count` steps of the engine fail."""
    engine = client.app.state.served.worker._engine
    step, failures = engine.step, iter(range(count))

    def failing_step() -> Any:
        if next(failures, None) is not None:
            raise RuntimeError("no memory")
        return step()

    monkeypatch.setattr(engine, "step", failing_step)


def test_a_step_that_fails_is_status_500_and_the_next_request_is_answered(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = client.post("/v1/completions", json=BODY).json()["choices"]
    fail_steps(client, monkeypatch, count=1)
    answer = client.post("/v1/completions", json=BODY)
    assert answer.status_code == 500
    assert "RuntimeError" in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json=BODY).json()["choices"] == before
    assert client.get("/health").status_code == 200


def test_an_engine_that_keeps_failing_is_not_healthy(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_steps(client, monkeypatch, count=100)
    for _ in range(4):
        assert client.post("/v1/completions", json=BODY).status_code == 500
    assert client.get("/health").status_code == 500


def test_the_metrics_count_requests_and_tokens(client: TestClient) -> None:
    for _ in range(3):
        client.post("/v1/completions", json={**BODY, "prompt": ["a wash", "a still"]})
    lines = client.get("/metrics").text.splitlines()
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("potstill:")}
    assert values["potstill:prompt_tokens_total"] == 3 * (len("a wash") + len("a still"))
    assert values["potstill:generation_tokens_total"] == 3 * 2 * 4
    assert values["potstill:request_success_total"] == 6
    assert values["potstill:time_to_first_token_seconds_count"] == 6
    assert values["potstill:inter_token_latency_seconds_count"] == 3 * 2 * 3
    assert values["potstill:e2e_request_latency_seconds_count"] == 6
    assert values["potstill:num_requests_running"] == values["potstill:num_requests_waiting"] == 0
    assert 'model_name="tiny"' in lines[-1]
