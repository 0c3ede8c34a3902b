"""64 clients for two minutes: no error but 429, every greedy answer as for a single client, and flat memory."""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving import Server, serving

CLIENTS, SECONDS = 64, 120
WARM_UP = 30  # seconds until buffers, caches and threads have their size
GROWTH = 16 * 2**20  # bytes that the memory may grow in the minutes after that
PROMPTS = [f"{'the still boils a wash ' * (number % 8)}{number}" for number in range(32)]


def make_body(number: int) -> dict[str, Any]:
    """A greedy request; every second one is a chat, every third one a stream."""
    prompt = PROMPTS[number % len(PROMPTS)]
    content = {"messages": [{"role": "user", "content": prompt}]} if number % 2 else {"prompt": prompt}
    return {**content, "max_tokens": 8 + 4 * (number % 8), "temperature": 0, "stream": number % 3 == 0}


def get_text(body: dict[str, Any], answer: httpx.Response) -> str:
    """The text of an answer, whole or streamed."""
    if not body["stream"]:
        (choice,) = answer.json()["choices"]
        return str(choice["message"]["content"] if "messages" in body else choice["text"])
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n")[:-1]]
    assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in httpx.Response(200, text=event).json()["choices"]]
    return "".join(choice["delta"].get("content", "") if "messages" in body else choice["text"] for choice in choices)


def read_memory(server: Server) -> int:
    """The resident memory of the server's process, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


async def send(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> httpx.Response:
    route = "chat/completions" if "messages" in body else "completions"
    return await client.post(f"{url}/{route}", json=body)


async def load(server: Server, expected: list[str], codes: Counter[int], memory: list[int]) -> None:
    """All clients at once; `memory` is read once per second."""
    end = time.monotonic() + SECONDS
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=CLIENTS)) as http:

        async def run_client(number: int) -> None:
            while time.monotonic() < end:
                body = make_body(number % len(expected))
                answer = await send(http, server.url, body)
                codes[answer.status_code] += 1
                if answer.status_code == 429:
                    await asyncio.sleep(int(answer.headers["retry-after"]))
                else:
                    assert answer.status_code == 200, answer.text
                    assert get_text(body, answer) == expected[number % len(expected)]
                number += CLIENTS + 1

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(read_memory(server))
                await asyncio.sleep(1)

        await asyncio.gather(watch(), *map(run_client, range(CLIENTS)))


@pytest.mark.slow
def test_two_minutes_of_64_clients(server: Server) -> None:
    with serving(server.model, "--slots", "16", "--max-queue", "32") as loaded:
        with httpx.Client(timeout=60) as client:
            routes = {True: "chat/completions", False: "completions"}
            bodies = [make_body(number) for number in range(96)]
            expected = [
                get_text(body, client.post(f"{loaded.url}/{routes['messages' in body]}", json=body)) for body in bodies
            ]
        codes: Counter[int] = Counter()
        memory: list[int] = []
        asyncio.run(load(loaded, expected, codes, memory))
        root = loaded.url.removesuffix("/v1")
        metrics = httpx.get(f"{root}/metrics").text
    assert set(codes) <= {200, 429}
    assert codes[200] > 500
    assert codes[429] > 0
    assert 'num_requests_running{model_name="' in metrics
    assert max(memory[WARM_UP:]) - memory[WARM_UP] < GROWTH, [value // 2**20 for value in memory]
    print({"answers": codes[200], "busy": codes[429], "MiB": [memory[WARM_UP] // 2**20, memory[-1] // 2**20]})
