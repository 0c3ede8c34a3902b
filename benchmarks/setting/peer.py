"""Peers of potstill's decoding loop: Hugging Face's `generate`, and any server of the OpenAI protocol."""

import json
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import torch

Writer = Callable[[Sequence[list[int]], int], Any]


@torch.no_grad()
def write_greedy(model: Any, prompt: list[int], tokens: int, **options: Any) -> list[int]:
    """The `tokens` greedy tokens that `generate` writes after a prompt, whatever the generation config says."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=0,
        **options,
    )
    written: list[int] = output[0, len(prompt) :].tolist()
    return written


def make_hf_writer(model: Any, **options: Any) -> Writer:
    """Hugging Face's `generate`, one prompt after another."""

    def write(prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        return [write_greedy(model, prompt, tokens, **options) for prompt in prompts]

    return write


def make_server_writer(url: str, tokenizer: Any) -> Writer:
    """The server at `url`, one prompt after another, as text; its first model writes, and no stop token ends it.

    llama-cpp-python's server takes no ids and no `ignore_eos`, so the bias of the stop token bans it.
    """
    with urllib.request.urlopen(f"{url}/models") as response:
        model = json.load(response)["data"][0]["id"]

    def complete(prompt: list[int], tokens: int) -> None:
        body = {
            "model": model,
            "prompt": tokenizer.decode(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "logit_bias": {str(tokenizer.eos_token_id): -100},
        }
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/completions", data, headers)) as response:
            number = json.load(response)["usage"]["completion_tokens"]
        if number != tokens:
            raise ValueError(f"{url} wrote {number} tokens instead of {tokens}")

    def write(prompts: Sequence[list[int]], tokens: int) -> None:
        for prompt in prompts:
            complete(prompt, tokens)

    return write
