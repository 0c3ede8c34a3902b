"""`potstill serve`: an OpenAI-compatible server."""

import json
import sys
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import suppress_library_output


def serve(
    model: o.Model,
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

    def print_address(url: str) -> None:
        if as_json:
            print(json.dumps({"url": url, "model": model}), file=sys.__stdout__, flush=True)  # there is no later
        else:
            print(f"{model} answers at {url}; Ctrl-C ends it", flush=True)

    suppress_library_output()
    run(
        model,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        on_ready=print_address,
    )
