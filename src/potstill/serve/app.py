"""An OpenAI-compatible server for one model: `/v1/models` and `/v1/completions` (extra `serve`)."""

import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import MissingDependency, NotFound, PotstillError, UsageError
from potstill.models.load import LoadedModel, load_model
from potstill.serve.completion import CompletionHandler
from potstill.serve.request import CompletionRequest

ERROR_TYPES = {400: "BadRequestError", 404: "NotFoundError"}


def create_app(loaded: LoadedModel, *, name: str) -> Any:
    """The FastAPI application that serves `loaded` under `name`.

    Raises: MissingDependency without the extra `serve`.
    """
    with explain_missing_dependency():
        from fastapi import FastAPI
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse
    handler, start_time = CompletionHandler(loaded), int(time.time())

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
        code = 404 if isinstance(error, NotFound) else 400
        message = str(error) if isinstance(error, PotstillError) else describe_validation_errors(error)
        return JSONResponse(
            {"error": {"message": message, "type": ERROR_TYPES[code], "param": None, "code": code}}, code
        )

    app = FastAPI(title="potstill", docs_url=None, redoc_url=None)
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/completions", create_completion, methods=["POST"], response_model=None)
    app.add_exception_handler(RequestValidationError, handle_error)
    app.add_exception_handler(PotstillError, handle_error)
    return app


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
    loaded.model.to(device=target_device, dtype=resolve_dtype(dtype, device_type=str(target_device)))
    app = create_app(loaded, name=model)
    with open_socket(host, port) as server_socket:
        on_ready(f"http://{host}:{server_socket.getsockname()[1]}/v1")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[server_socket])


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
