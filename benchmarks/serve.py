"""Throughput and latency of `potstill serve` by the number of clients, beside one-by-one Hugging Face generate.

SmolLM2-135M in bf16 continues docstrings of Python's standard library greedily, 64 new tokens each. Every client sends
its next request when its answer is complete. Hugging Face's `generate` answers the same prompts one after another in a
process of its own. `--peer NAME=URL` measures any other OpenAI-compatible server that runs already, such as vLLM's or
llama-cpp-python's, in the same way.

    python benchmarks/serve.py --json
    python benchmarks/serve.py --json --peer vllm=http://127.0.0.1:8111/v1
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from setting.document import command_line, document, refuse_on_red

RESTS_ON = ["tests/serve/test_openai_client.py", "tests/serve/test_limits.py", "tests/decode"]
CLIENTS = (1, 4, 16, 64)
NEW_TOKENS = 64
PROMPT_TOKENS = 64
REQUESTS_PER_CLIENT = {1: 6, 4: 2, 16: 2, 64: 1}


def main() -> None:
    """Serves, loads, generates one by one, prints one document."""
    options = parse_arguments()
    prompts = load_prompts(max(n * REQUESTS_PER_CLIENT[n] for n in options.clients))
    if options.one_by_one:
        print(json.dumps(generate_one_by_one(prompts[: REQUESTS_PER_CLIENT[1]])))
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    figures: dict[str, Any] = {"hf_generate": run_one_by_one()}
    print(f"generate, one by one: {figures['hf_generate']}", file=sys.stderr, flush=True)
    with serve_model(options.slots) as url:
        figures["potstill"] = measure_server(url, prompts, options.clients)
    for peer in options.peer:
        name, _, url = peer.partition("=")
        figures[name] = measure_server(url, prompts, options.clients)
    baseline = figures["hf_generate"]["tokens_per_second"]
    for name, rows in figures.items():
        for row in rows.values() if name != "hf_generate" else ():
            row["times_hf_generate"] = row["tokens_per_second"] / baseline
    rows = figures["potstill"]
    met = {
        "no request fails": not any(row["errors"] for row in rows.values()),
        "one client at least as fast as one-by-one generate": rows[1]["times_hf_generate"] >= 1,
        "16 clients at least 3 times one-by-one generate": rows[16]["times_hf_generate"] >= 3,
    }
    print(document("serve", figures, met))


def parse_arguments() -> argparse.Namespace:
    """The arguments; `--one-by-one` is for the child process of Hugging Face's generate."""
    parser = command_line(__doc__)
    parser.add_argument("--slots", type=int, default=16, help="answers that the server generates at once")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="another server that runs")
    parser.add_argument("--one-by-one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.clients = CLIENTS
    return options


def load_prompts(number: int) -> list[list[int]]:
    """The first tokens of docstrings, as ids."""
    from setting.text import load_documents

    documents = [ids for batch in load_documents(1, number * 512) for ids in batch if len(ids) >= PROMPT_TOKENS]
    return [documents[index % len(documents)][:PROMPT_TOKENS] for index in range(number)]


@contextmanager
def serve_model(slots: int) -> Iterator[str]:
    """The URL of `potstill serve smollm2` in a process of its own."""
    command = [sys.executable, "-m", "potstill", "serve", "smollm2", "--port", "0", "--dtype", "bfloat16", "--json"]
    command += ["--slots", str(slots), "--max-queue", "128"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            process.wait(60)


def run_one_by_one() -> dict[str, float]:
    """Hugging Face's generate in a process of its own."""
    command = [sys.executable, __file__, "--one-by-one"]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def generate_one_by_one(prompts: list[list[int]]) -> dict[str, float]:
    """Tokens per second, and seconds of an answer, of Hugging Face's generate."""
    import torch

    from potstill.models import gguf, locate
    from setting.peer import write_greedy

    model = gguf.load_model(locate.get_packaged_path(), dtype=torch.bfloat16).eval()

    def generate(ids: list[int]) -> float:
        start = time.perf_counter()
        write_greedy(model, ids, NEW_TOKENS)
        return time.perf_counter() - start

    generate(prompts[0])
    seconds = [generate(ids) for ids in prompts]
    return {
        "tokens_per_second": NEW_TOKENS * len(seconds) / sum(seconds),
        "answer_seconds": statistics.median(seconds),
    }


def measure_server(url: str, prompts: list[list[int]], clients: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """The figures by the number of clients."""
    asyncio.run(send_all(url, prompts[:1], 1))
    rows: dict[int, dict[str, float]] = {}
    for number in clients:
        rows[number] = asyncio.run(send_all(url, prompts, number))
        print(f"{url}, {number} clients: {rows[number]}", file=sys.stderr, flush=True)
    return rows


async def send_all(url: str, prompts: list[list[int]], num_clients: int) -> dict[str, float]:
    """What `num_clients` clients get, each of which sends its share of the prompts one after another."""
    import httpx

    count = min(len(prompts), num_clients * REQUESTS_PER_CLIENT[num_clients])
    queue = iter(prompts[:count])
    answers: list[dict[str, float]] = []
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        model = (await client.get(f"{url}/models")).json()["data"][0]["id"]

        async def send() -> None:
            for prompt in queue:
                answers.append(await read_answer(client, f"{url}/completions", model, prompt))

        start = time.perf_counter()
        await asyncio.gather(*(send() for _ in range(num_clients)))
        seconds = time.perf_counter() - start
    complete = [answer for answer in answers if not answer["errors"]]
    return {
        "requests": len(answers),
        "errors": len(answers) - len(complete),
        "tokens_per_second": sum(answer["tokens"] for answer in complete) / seconds,
        "first_token_seconds": statistics.median(answer["first"] for answer in complete),
        "between_tokens_seconds": statistics.median(answer["between"] for answer in complete),
        "answer_seconds": statistics.median(answer["seconds"] for answer in complete),
    }


async def read_answer(client: Any, url: str, model: str, prompt: list[int]) -> dict[str, float]:
    """The tokens and times of one streamed answer."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first, tokens = 0.0, 0
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            return {"errors": 1}
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk["choices"] and not first:
                first = time.perf_counter() - start
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    seconds = time.perf_counter() - start
    between = (seconds - first) / max(tokens - 1, 1)
    return {"errors": 0, "tokens": tokens, "first": first, "between": between, "seconds": seconds}


if __name__ == "__main__":
    main()
