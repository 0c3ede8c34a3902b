"""Chats reach the model as its chat template writes them: parts, roles, tools; without a template they are refused."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.serving import load_tiny, open_client

TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ':' }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "{{ 'call ' + call.function.name + ' ' + call.function.arguments.items() | map('join', '=') | join(',') }}"
    "{% endfor %}{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)
GREEDY = {"max_tokens": 8, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with open_client() as client:
        yield client


@pytest.fixture(scope="module")
def tool_client() -> Iterator[TestClient]:
    loaded = load_tiny()
    loaded.tokenizer.chat_template = TOOL_TEMPLATE
    with open_client(loaded) as client:
        yield client


def chat(client: TestClient, *messages: dict[str, Any], **body: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": messages, **GREEDY, **body})


def complete(client: TestClient, prompt: str) -> Any:
    """The answer to the text that a chat template should have written."""
    body = {**GREEDY, "prompt": prompt, "add_special_tokens": False}
    return client.post("/v1/completions", json=body).json()


def same(answer: Any, completion: Any) -> None:
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"] == completion["usage"]
    assert answer.json()["choices"][0]["message"]["content"] == completion["choices"][0]["text"]


def test_a_chat_is_rendered_by_the_template_up_to_the_answer(client: TestClient) -> None:
    answer = chat(client, {"role": "system", "content": "S"}, {"role": "user", "content": "U"})
    prompt = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    same(answer, complete(client, prompt))


def test_text_parts_are_joined_and_the_developer_is_the_system_where_the_template_has_none(client: TestClient) -> None:
    parts = [{"type": "text", "text": "U"}, {"type": "text", "text": "V"}]
    answer = chat(client, {"role": "developer", "content": "S"}, {"role": "user", "content": parts})
    plain = chat(client, {"role": "system", "content": "S"}, {"role": "user", "content": "U\nV"})
    assert answer.json()["choices"] == plain.json()["choices"]


def test_tools_and_calls_reach_a_template_that_reads_them(tool_client: TestClient) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weigh", "arguments": '{"x": 3}'}}
    messages = (
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
    )
    answer = chat(tool_client, *messages, tools=[TOOL], tool_choice="none")
    prompt = (
        "[weigh]<|im_start|>user:U<|im_end|><|im_start|>assistant:call weigh x=3<|im_end|>"
        "<|im_start|>tool:7<|im_end|><|im_start|>assistant:"
    )
    same(answer, complete(tool_client, prompt))


def test_calls_that_the_template_cannot_write_are_refused(client: TestClient) -> None:
    call = {"function": {"name": "weigh", "arguments": "{}"}}
    answer = chat(client, {"role": "user", "content": "U"}, {"role": "assistant", "tool_calls": [call]})
    assert answer.status_code == 400
    assert "no tool calls" in answer.json()["error"]["message"]


def test_without_a_template_chats_are_refused_and_completions_answered() -> None:
    loaded = load_tiny()
    loaded.tokenizer.chat_template = None
    with open_client(loaded) as client:
        answer = chat(client, {"role": "user", "content": "U"})
        assert answer.status_code == 400
        assert "--chat-template" in answer.json()["error"]["message"]
        assert complete(client, "U")["choices"]


def test_an_answer_without_a_limit_may_fill_the_context(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "U"}], "temperature": 0, "ignore_eos": True}
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["total_tokens"] == 256
