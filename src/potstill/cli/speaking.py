"""What lets them speak: generate, serve."""

import json
import sys
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.verb import answer, hush
from potstill.core.errors import UsageError


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file or smollm2.")],
    prompt: Annotated[str, typer.Option(help="What to answer; '-' reads standard input.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without the chat template.")] = False,
    device: o.Device = "auto",
    seed: o.Seed = 1,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Let a model write.

    Example: [bold]potstill generate smollm2 --prompt "What is a pot still?"[/]
    """
    from potstill.pipeline.generate import generate_text

    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} must be at least 1")
    if not temperature >= 0:
        raise UsageError(f"--temperature {temperature} must be at least 0, which is greedy")
    hush()
    found = generate_text(
        model,
        sys.stdin.read() if prompt == "-" else prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        raw=raw,
        device=device,
        seed=seed,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    return answer(found, as_json, lambda: print(found["text"]))


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file or smollm2.")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is all of them, without a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port; 0 is any free one.")] = 8000,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Answer completions over HTTP as OpenAI and vLLM do, until it is interrupted; a student can learn from it.

    Example: [bold]potstill serve smollm2 --port 8000[/]
    """
    from potstill.serve.app import serve as run

    def ready(url: str) -> None:
        if as_json:
            print(json.dumps({"url": url, "model": model}), file=sys.__stdout__, flush=True)  # there is no later
        else:
            print(f"{model} answers at {url}; Ctrl-C ends it", flush=True)

    hush()
    run(
        model,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        ready=ready,
    )
