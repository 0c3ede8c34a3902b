"""`potstill serve`: serve a model over HTTP with the completions API of OpenAI and vLLM."""

import json
import sys
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import suppress_library_output
from potstill.core.options import (
    ALLOW_PICKLE,
    DEVICE,
    DTYPE,
    IGNORE_GENERATION_CONFIG,
    MAX_LOGPROBS,
    TRUST_REMOTE_CODE,
)


def serve(
    model: o.Model,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0: all. The server asks for no API key.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(help="The port; 0: any free port.")] = 8000,
    max_logprobs: o.MaxLogprobs = MAX_LOGPROBS.default,
    ignore_generation_config: o.IgnoreGenerationConfig = IGNORE_GENERATION_CONFIG.default,
    device: o.Device = DEVICE.default,
    dtype: o.Dtype = DTYPE.default,
    allow_pickle: o.AllowPickle = ALLOW_PICKLE.default,
    trust_remote_code: o.TrustRemoteCode = TRUST_REMOTE_CODE.default,
    as_json: o.Json = False,
) -> Any:
    """Serve a model over HTTP with the completions API of OpenAI and vLLM, until Ctrl-C.

    What a request leaves open comes from the model's generation config: temperature, top_p, top_k, min_p and
    repetition_penalty, which a note names at the start. A request at temperature 0 gets the model's own argmax.

    Example: [bold]potstill serve smollm2 --port 8000[/]
    """
    from potstill.serve.app import serve as run
    from potstill.stages.preflight import StageInputs

    def print_address(url: str) -> None:
        if as_json:
            print(json.dumps({"url": url, "model": model}), file=sys.__stdout__, flush=True)  # print it at once
        else:
            print(f"{model} is served at {url}; press Ctrl-C to stop", flush=True)

    suppress_library_output()
    StageInputs(models=(model,), packages=("fastapi", "uvicorn")).check()
    run(
        model,
        host=host,
        port=port,
        max_logprobs=max_logprobs,
        ignore_generation_config=ignore_generation_config,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        on_ready=print_address,
    )
