"""What the server checks before it reads a request: the host, the key, and the size and pace of the body."""

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from potstill.serve.errors import make_error_response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BODY_SECONDS = 30.0  # for a client to send the whole body
KEY_PREFIX = "/v1"  # health, metrics and the chat page need no key, as in vLLM


class RequestGuard:
    """An ASGI application before `app`, which refuses requests that `app` must not see.

    The `Host` header must be an IP address, localhost, this machine's name or one of `allowed_hosts`. A web page that
    a browser opened elsewhere can thus not reach the server by a name that points to it (DNS rebinding).
    """

    def __init__(
        self, app: Any, *, api_key: str | None, max_body: int, allowed_hosts: Sequence[str], body_seconds: float
    ) -> None:
        self.app, self.max_body, self.body_seconds = app, max_body, body_seconds
        self.api_key = api_key.encode() if api_key else None
        self.allowed_hosts = {name.lower() for name in ("localhost", socket.gethostname(), *allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request that is refused, and passes on all others."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = BodyReader(receive, self.max_body, self.body_seconds)
            await self.app(scope, body.receive, send)
        except HTTPException as error:
            await make_error_response(error)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = get_host_name(headers.get("host", ""))
        if not (is_ip_address(host) or host in self.allowed_hosts):
            raise HTTPException(
                403, f"this server does not answer for the host {host!r}; start it with --allowed-host {host}"
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body:
            raise HTTPException(413, describe_body_limit(self.max_body))
        if self.api_key and scope["path"].startswith(KEY_PREFIX):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key):
                message = "the API key is missing or wrong; send the header 'Authorization: Bearer KEY'"
                raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})


class BodyReader:
    """Passes on the messages of a request; refuses a body that is too long or comes too slowly."""

    def __init__(self, receive: Receive, max_body: int, seconds: float) -> None:
        self._receive, self._max_body, self._seconds = receive, max_body, seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._num_bytes, self._is_complete = 0, False

    async def receive(self) -> MutableMapping[str, Any]:
        """The next message. Raises: HTTPException 408 or 413."""
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not arrive within {self._seconds:g} seconds") from error
        self._num_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._num_bytes > self._max_body:
            raise HTTPException(413, describe_body_limit(self._max_body))
        return message


def describe_body_limit(max_body: int) -> str:
    """The message of status 413."""
    return f"the body has more than {max_body} bytes; send less, or start the server with a larger --max-body"


def get_host_name(host_header: str) -> str:
    """The name or address in a `Host` header, without the port and in lower case."""
    name = host_header.rpartition(":")[0] if host_header.rpartition(":")[2].isdecimal() else host_header
    return name.strip("[]").lower()


def is_ip_address(name: str) -> bool:
    """Whether a name is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
