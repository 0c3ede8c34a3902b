"""The OpenAPI document is true: answers and errors fit it, and requests made from it are never answered with 5xx."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck
from tests.serving import open_client, serving_in_thread

from potstill.serve import response

CHAT = [{"role": "user", "content": "a wash"}]
SHORT = {"max_tokens": 4, "n": 2}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with open_client() as client:
        yield client


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/completions", {"prompt": "a"}, response.CompletionResponse),
        ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 2, "echo": True}, response.CompletionResponse),
        ("/v1/completions", {"prompt": "ab", "prompt_logprobs": 2, "max_tokens": 0}, response.CompletionResponse),
        ("/v1/chat/completions", {"messages": CHAT, **SHORT}, response.ChatCompletionResponse),
        (
            "/v1/chat/completions",
            {"messages": CHAT, "logprobs": True, "max_tokens": 3},
            response.ChatCompletionResponse,
        ),
        ("/v1/completions", {"prompt": ""}, response.ErrorResponse),
        ("/v1/models", None, response.ModelList),
        ("/health", None, response.Health),
    ],
)
def test_what_is_answered_is_what_the_document_describes(
    client: TestClient, path: str, body: Any, model: type[response.BaseModel]
) -> None:
    answer = client.post(path, json=body) if body else client.get(path)
    content = answer.json()
    described = client.get("/openapi.json").json()["paths"][path]["post" if body else "get"]["responses"]
    schema = described[str(answer.status_code)]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith(f"/{model.__name__}")
    assert model.model_validate(content, strict=True).model_dump(mode="json") == content


def test_the_document_names_no_status_that_the_server_never_gives(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    codes = {code for path in document["paths"].values() for way in path.values() for code in way["responses"]}
    assert "422" not in codes
    assert codes == {"200", "400", "401", "403", "404", "408", "413", "429", "500", "503"}
    stream = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(stream) == {"application/json", "text/event-stream"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")  # the server's thread draws too
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_requests_made_from_the_document_get_no_status_5xx_and_only_described_answers(mode: str) -> None:
    import hypothesis
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
    counts: Counter[int] = Counter()
    with serving_in_thread(context=128) as server:
        schema = schemathesis.openapi.from_url(f"{server.root}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        for operation in operations if mode == "positive" else [one for one in operations if one.method == "post"]:
            strategy = operation.as_strategy(schemathesis.GenerationMode(mode))

            @hypothesis.given(case=strategy)
            @hypothesis.settings(
                max_examples=200,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            def call(case: Any) -> None:
                answer = case.call(timeout=30)
                counts[answer.status_code] += 1
                case.validate_response(answer, checks=checks)

            call()
        server.wait_until_idle()
    assert not [code for code in counts if code >= 500]
    assert counts[200 if mode == "positive" else 400] > 100
