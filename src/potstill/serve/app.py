"""An OpenAI-compatible server for one model: `/v1/models` and `/v1/completions` (extra `serve`)."""

import contextlib
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import MissingDependency, NotFound, PotstillError, UsageError
from potstill.core.options import IGNORE_GENERATION_CONFIG, MAX_LOGPROBS
from potstill.decode.generation_config import describe_settings, log_unused_settings, read_sampling_defaults
from potstill.models.load import LoadedModel, load_model
from potstill.serve.completion import CompletionHandler
from potstill.serve.request import CompletionRequest

log = logging.getLogger("potstill")
ERROR_TYPES = {400: "BadRequestError", 404: "NotFoundError"}


def create_app(
    loaded: LoadedModel,
    *,
    name: str,
    max_logprobs: int = MAX_LOGPROBS.default,
    sampling_defaults: Mapping[str, float] | None = None,
) -> Any:
    """The FastAPI application that serves `loaded` under `name`.

    `sampling_defaults` replace what a request leaves open. `max_logprobs` is the most log-probabilities of a token that
    a request may ask for; -1 is no limit.

    Raises: MissingDependency without the extra `serve`; UsageError for a `max_logprobs` below -1.
    """
    with explain_missing_dependency():
        from fastapi import FastAPI
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse
        from starlette.exceptions import HTTPException
    handler = CompletionHandler(loaded, max_logprobs=max_logprobs, sampling_defaults=sampling_defaults)
    start_time = int(time.time())

    def list_models() -> Any:
        model_card = {
            "id": name,
            "object": "model",
            "created": start_time,
            "owned_by": "potstill",
            "root": name,
            "parent": None,
        }
        return JSONResponse({"object": "list", "data": [model_card]})

    def create_completion(request: CompletionRequest) -> Any:
        if request.model not in (None, name):
            raise NotFound(f"the model {request.model!r} does not exist; this server has {name!r}")
        choices, usage = handler.create_completion(request)
        metadata = {"object": "text_completion", "created": int(time.time()), "model": name}
        return JSONResponse({"id": f"cmpl-{uuid.uuid4().hex}", **metadata, "choices": choices, "usage": usage})

    def handle_error(_: Any, error: Exception) -> Any:
        code, message = describe_error(error)
        error_type = ERROR_TYPES.get(code, "Error")
        return JSONResponse({"error": {"message": message, "type": error_type, "param": None, "code": code}}, code)

    app = FastAPI(title="potstill", docs_url=None, redoc_url=None)
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/completions", create_completion, methods=["POST"], response_model=None)
    for error_class in (RequestValidationError, PotstillError, HTTPException):
        app.add_exception_handler(error_class, handle_error)
    return app


def describe_error(error: Any) -> tuple[int, str]:
    """(status, message) of an error; half a character that a request sent becomes a question mark."""
    from starlette.exceptions import HTTPException

    if isinstance(error, HTTPException):
        code, message = error.status_code, str(error.detail)
    elif isinstance(error, PotstillError):
        code, message = 404 if isinstance(error, NotFound) else 400, str(error)
    else:
        code, message = 400, describe_validation_errors(error)
    return code, message.encode("utf-8", "replace").decode()


def describe_validation_errors(error: Any) -> str:
    """The errors that pydantic found in a request: the first error of each field."""
    messages: dict[str, str] = {}
    for detail in error.errors():
        field = str(detail["loc"][1]) if len(detail["loc"]) > 1 and detail["type"] != "json_invalid" else "the body"
        messages.setdefault(field, detail["msg"])
    return "; ".join(f"{field}: {message}" for field, message in messages.items())


def serve(
    model: str,
    *,
    host: str,
    port: int,
    max_logprobs: int = MAX_LOGPROBS.default,
    ignore_generation_config: bool = IGNORE_GENERATION_CONFIG.default,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve `model` until an interrupt; `on_ready` receives the URL once the server listens. Port 0 takes a free port.

    Raises: MissingDependency, NotFound; UsageError if the server cannot listen at this address.
    """
    with explain_missing_dependency():
        import uvicorn
    loaded = load_model(model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    target_device = resolve_device(device)
    loaded.move_to(target_device, resolve_dtype(dtype, device_type=str(target_device)))
    sampling_defaults = {} if ignore_generation_config else choose_sampling_defaults(loaded)
    app = create_app(loaded, name=model, max_logprobs=max_logprobs, sampling_defaults=sampling_defaults)
    with open_socket(host, port) as server_socket:
        on_ready(f"http://{host}:{server_socket.getsockname()[1]}/v1")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[server_socket])


def choose_sampling_defaults(loaded: LoadedModel) -> dict[str, float]:
    """The sampling defaults of the model's generation config, named on stderr with what is not used."""
    defaults = read_sampling_defaults(loaded.model)
    log_unused_settings(loaded.model, loaded.name)
    if defaults:
        log.warning(
            "note: requests that sample and say nothing else use %s of the generation config of %s; "
            "--ignore-generation-config drops them",
            describe_settings(defaults),
            loaded.name,
        )
    return defaults


@contextlib.contextmanager
def explain_missing_dependency() -> Iterator[None]:
    """Turn a failed import into the command that installs the package.

    Raises: MissingDependency.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependency(f"{error.name} is not installed; run: pip install 'potstill[serve]'") from error


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises: UsageError if the port is out of range or taken.
    """
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port} is not a port; choose one from 0 to {2**16 - 1}")
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UsageError(f"cannot listen at {host}:{port} ({error}); choose another --host or --port") from error
