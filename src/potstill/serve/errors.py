"""The errors of the server, with their HTTP status, in OpenAI's format."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from potstill.core.errors import NotFound, PotstillError, ServerError

ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class HttpError(ServerError):
    """An error with its HTTP status and headers."""

    status = 500

    @property
    def headers(self) -> dict[str, str]:
        """Further headers of the response."""
        return {}


class ServerBusy(HttpError):
    """All slots are taken and the queue is full; the client should try again after `wait` seconds."""

    status = 429

    def __init__(self, message: str, *, wait: float) -> None:
        super().__init__(message)
        self.wait = wait

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.wait)))}


class AnswerTimeout(HttpError):
    """An answer was not complete in time. The header keeps OpenAI's client from asking for it again."""

    status = 408

    @property
    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class ServerStopping(HttpError):
    """The server shuts down."""

    status = 503


class EngineFailure(HttpError):
    """The engine failed while it generated this answer."""


def describe_error(error: Exception) -> tuple[int, str, Mapping[str, str]]:
    """(status, message, headers) of an error; half a character that a request sent becomes a question mark."""
    headers: Mapping[str, str] = {}
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), error.headers or {}
    elif isinstance(error, HttpError):
        status, message, headers = error.status, str(error), error.headers
    elif isinstance(error, PotstillError):
        status, message = 404 if isinstance(error, NotFound) else 400, str(error)
    elif isinstance(error, RequestValidationError):
        status, message = 400, describe_validation_errors(error)
    else:
        status, message = 500, f"the server failed at this request ({type(error).__name__}); its log has the details"
    return status, message.encode("utf-8", "replace").decode(), headers


def describe_validation_errors(error: Any) -> str:
    """The errors that pydantic found in a request: the first error of each field."""
    messages: dict[str, str] = {}
    for detail in error.errors():
        is_field = len(detail["loc"]) > 1 and detail["type"] != "json_invalid"
        field = str(detail["loc"][1]) if is_field else "the body"
        messages.setdefault(field, str(detail["msg"]).removeprefix("Value error, "))
    return "; ".join(f"{field}: {message}" for field, message in messages.items())


def build_error(status: int, message: str) -> dict[str, Any]:
    """The body of an error response."""
    error_type = ERROR_TYPES.get(status, "Error")
    return {"error": {"message": message, "type": error_type, "param": None, "code": status}}


def make_error_response(error: Exception) -> JSONResponse:
    """The response to an error."""
    status, message, headers = describe_error(error)
    return JSONResponse(build_error(status, message), status, headers=dict(headers))
