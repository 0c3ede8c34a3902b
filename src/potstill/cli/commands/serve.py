"""`potstill serve`: serve a model over HTTP with the API of OpenAI."""

import json
import sys
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import suppress_library_output
from potstill.decode.drafters.options import DraftOptions
from potstill.serve.options import API_KEY_VARIABLE, ServeLimits, ServeOptions
from potstill.stages.options import TextOptions


@o.take_options(ServeOptions)
def serve(
    model: o.Model,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=API_KEY_VARIABLE, help="The key that clients must send; other users of this machine see options."
        ),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="The chat template to use: a Jinja file, minichat or phoenix.")
    ] = None,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Serve a model to any OpenAI client, with a chat page for browsers, until Ctrl-C.

    It answers /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics; the chat page is at /. What a
    request leaves open comes from the model's generation config, which a note names at the start: temperature, top_p,
    top_k, min_p and repetition_penalty. A request at temperature 0 gets the model's own argmax.

    Example: [bold]potstill serve smollm2 --port 8000[/]

    Example: [bold]potstill serve student --host 0.0.0.0 --slots 32[/]
    """
    from potstill.serve.server import serve as run
    from potstill.stages.preflight import StageInputs
    from potstill.stages.text_options import set_chat_template

    def print_address(url: str) -> None:
        if as_json:
            print(json.dumps({"url": url, "model": model}), file=sys.__stdout__, flush=True)  # print it at once
        else:
            page = url.removesuffix("v1")
            print(f"{model} is served at {url}, and chats at {page}; press Ctrl-C to stop", flush=True)

    limits = ServeLimits(**o.read_options(ServeLimits, options))
    drafts = DraftOptions(**o.read_options(DraftOptions, options))
    text_options = TextOptions(chat_template=chat_template)
    suppress_library_output()
    StageInputs(models=(model,), packages=("fastapi", "uvicorn", "prometheus_client")).check()
    run(
        model,
        ServeOptions(limits=limits, drafts=drafts, **o.read_options(ServeOptions, options)),
        api_key=api_key,
        on_load=lambda loaded: set_chat_template(loaded.tokenizer, text_options.chat_template),
        on_ready=print_address,
    )
