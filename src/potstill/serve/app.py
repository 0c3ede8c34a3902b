"""An OpenAI-compatible server for one model (extra `serve`)."""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from potstill import __version__
from potstill.core.errors import PotstillError
from potstill.models.load import LoadedModel
from potstill.serve.auto_size import AutoSize
from potstill.serve.chat import create_chat_completion
from potstill.serve.completion import create_completion
from potstill.serve.errors import EngineFailure, make_error_response
from potstill.serve.guard import BODY_SECONDS, RequestGuard
from potstill.serve.metrics import CONTENT_TYPE
from potstill.serve.options import ServeLimits
from potstill.serve.request import ChatCompletionRequest, CompletionRequest
from potstill.serve.response import (
    ChatCompletionResponse,
    CompletionResponse,
    Health,
    ModelList,
    describe_responses,
)
from potstill.serve.served_model import ServedModel, Speculate, no_speculation
from potstill.serve.streaming import ClientLeft

log = logging.getLogger("potstill")
GENERATION_ERRORS = (400, 401, 403, 404, 408, 413, 429, 500, 503)
CLIENT_LEFT = 499  # nobody reads this status
PAGE_HEADERS = {  # the page loads nothing from elsewhere, and no other page shows it in a frame
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(
    loaded: LoadedModel,
    *,
    name: str,
    limits: ServeLimits | None = None,
    sampling_defaults: Mapping[str, float] | None = None,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = (),
    speculate: Speculate = no_speculation,
    auto_size: AutoSize | None = None,
) -> FastAPI:
    """The FastAPI application that serves `loaded` under `name`; its lifespan runs the engine's thread.

    `sampling_defaults` replace what a request leaves open. With an `api_key`, the routes below `/v1` want it as bearer
    token. `allowed_hosts` are further names of this machine. `speculate` says what drafts tokens;
    `auto_size` lets an elastic model answer with a size by the load, and without drafts.

    Raises: UsageError for a context above the model's, or `auto_size` with a model without sizes.
    """
    limits, defaults = limits or ServeLimits(), sampling_defaults or {}
    served = ServedModel(
        loaded, name=name, limits=limits, sampling_defaults=defaults, speculate=speculate, auto_size=auto_size
    )

    @asynccontextmanager
    async def run_engine(_: FastAPI) -> AsyncIterator[None]:
        served.worker.start()
        try:
            yield
        finally:
            served.worker.stop()

    app = FastAPI(
        title="potstill",
        version=__version__,
        description=f"The OpenAI-compatible API of {name}.",
        docs_url=None,
        redoc_url=None,
        lifespan=run_engine,
    )
    app.state.served = served
    add_generation_routes(app, served)
    add_status_routes(app, served)
    drop_validation_status(app)
    for error_class in (RequestValidationError, PotstillError, HTTPException, ClientLeft, Exception):
        app.add_exception_handler(error_class, handle_error)
    app.add_middleware(
        RequestGuard, api_key=api_key, max_body=limits.max_body, allowed_hosts=allowed_hosts, body_seconds=BODY_SECONDS
    )
    return app


def add_generation_routes(app: FastAPI, served: ServedModel) -> None:
    """The routes that generate text."""

    async def post_completion(request: CompletionRequest, http: Request) -> Response:
        """Continue prompts, and score their tokens."""
        return await create_completion(served, request, http)

    async def post_chat_completion(request: ChatCompletionRequest, http: Request) -> Response:
        """Answer a chat."""
        return await create_chat_completion(served, request, http)

    for path, handler, model in (
        ("/v1/completions", post_completion, CompletionResponse),
        ("/v1/chat/completions", post_chat_completion, ChatCompletionResponse),
    ):
        responses = describe_responses(model, *GENERATION_ERRORS, streams=True)
        app.add_api_route(path, handler, methods=["POST"], response_model=None, responses=responses)


def add_status_routes(app: FastAPI, served: ServedModel) -> None:
    """The routes that tell about the server, and the chat page."""

    async def list_models() -> Response:
        """List the one model."""
        model_card = {
            "id": served.name,
            "object": "model",
            "created": served.start_time,
            "owned_by": "potstill",
            "root": served.name,
            "parent": None,
            "max_model_len": served.context,
        }
        return JSONResponse({"object": "list", "data": [model_card]})

    async def get_health() -> Response:
        """Whether the server generates text."""
        if served.worker.is_broken:
            raise EngineFailure("the engine has failed several times; restart the server")
        return JSONResponse({"status": "ok"})

    async def get_metrics() -> Response:
        """The metrics for Prometheus."""
        return Response(served.metrics.export(), media_type=CONTENT_TYPE)

    async def get_page() -> Response:
        """The chat page."""
        return HTMLResponse(files("potstill.serve").joinpath("chat.html").read_text("utf-8"), headers=PAGE_HEADERS)

    app.add_api_route("/v1/models", list_models, response_model=None, responses=describe_responses(ModelList, 401, 403))
    app.add_api_route("/health", get_health, response_model=None, responses=describe_responses(Health, 403, 500))
    app.add_api_route("/metrics", get_metrics, response_class=Response, include_in_schema=False)
    app.add_api_route("/", get_page, response_class=HTMLResponse, include_in_schema=False)


def drop_validation_status(app: FastAPI) -> None:
    """Takes FastAPI's status 422 out of the OpenAPI document: an invalid request gets status 400 here."""
    build_document = app.openapi

    def build_own_document() -> dict[str, Any]:
        document: dict[str, Any] = build_document()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = build_own_document


async def handle_error(_: Request, error: Exception) -> Response:
    """The response to an error, in OpenAI's format."""
    if isinstance(error, ClientLeft):
        return Response(status_code=CLIENT_LEFT)
    if not isinstance(error, PotstillError | HTTPException | RequestValidationError):
        log.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    return make_error_response(error)
