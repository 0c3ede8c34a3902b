"""A judge behind HTTP: what it is asked, and what a reply that is none becomes."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tests.serving import Server

from potstill.core.errors import ServerError, UsageError
from potstill.teachers.served_judge import ServedJudge, open_judge
from potstill.train.rewards.base import Completion
from potstill.train.rewards.registry import get_reward


@contextmanager
def serve_chat(reply: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose every chat completion is `reply`; its address, and the bodies of the requests."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "judge-1"}]})

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(reply)

        def answer(self, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_judge_is_asked_with_the_published_sampling() -> None:
    with serve_chat({"choices": [{"message": {"content": "<score>0.25</score>"}}]}) as (url, bodies):
        reward = get_reward(f"thinking:judge={url}", open_judge=open_judge)
        rows = [{"solution": "3 + 4 = 7", "english": "What is 3 + 4?"}, {"solution": ""}]
        completions = [Completion("Combien font 3 + 4 ?", "donc 7</think>7", row, ended=True) for row in rows]
        assert reward(completions) == [0.25, 0.0]
    (body,) = bodies
    (message,) = body.pop("messages")
    assert body == {"model": "judge-1", "temperature": 0.6, "top_p": 0.95, "seed": 10, "max_tokens": 50}
    assert "What is 3 + 4?" in message["content"]


def test_a_named_model_is_asked_and_an_empty_reply_is_a_text() -> None:
    with serve_chat({"choices": [{"message": {"content": None}}]}) as (url, bodies):
        judge = ServedJudge(f"{url}#deepseek")
        assert judge(["a", "b"]) == ["", ""]
        judge.close()
    assert [body["model"] for body in bodies] == ["deepseek"] * 2


@pytest.mark.parametrize("reply", [{}, {"choices": []}, [], {"choices": [{"text": "1"}]}])
def test_what_is_no_chat_completion_is_refused(reply: Any) -> None:
    with serve_chat(reply) as (url, _):
        judge = ServedJudge(f"{url}#m")
        with pytest.raises(ServerError, match="gives no chat completion"):
            judge(["a"])
        judge.close()


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="is not the address of a server"):
        open_judge("gpt-4")


def test_potstill_s_own_server_can_judge(server: Server) -> None:
    judge = ServedJudge(f"{server.url}", max_tokens=3)
    first, second = judge(["What is 3 + 4?", "What is 4 + 4?"])
    judge.close()
    assert isinstance(first, str)
    assert judge.max_tokens == 3
    assert first != "" or second != ""
