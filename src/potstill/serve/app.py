"""An OpenAI-compatible server for one of our models: `/v1/models` and `/v1/completions` (extra `serve`)."""

import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from potstill.core import backend
from potstill.core.errors import MissingDependency, NotFound, PotstillError, UsageError
from potstill.models.load import Loaded, load
from potstill.serve.request import Completion
from potstill.serve.speaker import Speaker

NAMES = {400: "BadRequestError", 404: "NotFoundError"}


def application(loaded: Loaded, *, name: str) -> Any:
    """The FastAPI application that answers for `loaded` under `name`.

    Raises: MissingDependency without the extra `serve`.
    """
    with installed():
        from fastapi import FastAPI
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse
    speaker, since = Speaker(loaded), int(time.time())

    def models() -> Any:
        one = {"id": name, "object": "model", "created": since, "owned_by": "potstill", "root": name, "parent": None}
        return JSONResponse({"object": "list", "data": [one]})

    def completions(asked: Completion) -> Any:
        if asked.model not in (None, name):
            raise NotFound(f"the model {asked.model!r} does not exist; this server has {name!r}")
        choices, usage = speaker.answer(asked)
        facts = {"object": "text_completion", "created": int(time.time()), "model": name}
        return JSONResponse({"id": f"cmpl-{uuid.uuid4().hex}", **facts, "choices": choices, "usage": usage})

    def refuse(_: Any, error: Exception) -> Any:
        code = 404 if isinstance(error, NotFound) else 400
        said = str(error) if isinstance(error, PotstillError) else faults(error)
        return JSONResponse({"error": {"message": said, "type": NAMES[code], "param": None, "code": code}}, code)

    app = FastAPI(title="potstill", docs_url=None, redoc_url=None)
    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    app.add_exception_handler(RequestValidationError, refuse)
    app.add_exception_handler(PotstillError, refuse)
    return app


def faults(error: Any) -> str:
    """What pydantic found wrong with a request: each field once, with the first fault of it."""
    found: dict[str, str] = {}
    for one in error.errors():
        field = str(one["loc"][1]) if len(one["loc"]) > 1 and one["type"] != "json_invalid" else "the body"
        found.setdefault(field, one["msg"])
    return "; ".join(f"{field}: {said}" for field, said in found.items())


def serve(
    model: str,
    *,
    host: str,
    port: int,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    ready: Callable[[str], None] = print,
) -> None:
    """Serves `model` until it is interrupted; `ready` is told the address once it listens. Port 0 is any free one.

    Raises: MissingDependency, NotFound; UsageError for an address that cannot be listened at.
    """
    with installed():
        import uvicorn
    loaded = load(model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    place = backend.device(device)
    loaded.model.to(device=place, dtype=backend.dtype(dtype, on=str(place)))
    app = application(loaded, name=model)
    with listening(host, port) as listener:
        ready(f"http://{host}:{listener.getsockname()[1]}/v1")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Says what to install where an import fails.

    Raises: MissingDependency.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependency(f"{error.name} is not installed; run: pip install 'potstill[serve]'") from error


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises: UsageError.
    """
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port} is none; it lies between 0 and {2**16 - 1}")
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UsageError(f"{host}:{port} cannot be listened at ({error}); choose another --host or --port") from error
