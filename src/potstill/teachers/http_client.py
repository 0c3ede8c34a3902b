"""A client for JSON over HTTP to one server. It runs in its own thread, so the caller computes during requests."""

import asyncio
import os
import re
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from potstill.core.errors import MissingDependency, ServerError, UsageError

MAX_CONCURRENCY = 16  # requests at once; more would only wait in the server's queue
MAX_TRIES = 6
FIRST_WAIT, MAX_WAIT = 0.5, 30.0  # seconds before the second try; they double before each further one
TIMEOUT = 300.0  # seconds for an answer; a server may have many clients
API_KEY_VARIABLES = ("POTSTILL_API_KEY", "OPENAI_API_KEY")  # the first that is set is sent


class RequestRefused(ServerError):
    """The server refused a request, so trying again is useless. `reason` is the server's message."""

    def __init__(self, url: str, status: int, reason: str) -> None:
        super().__init__(
            f"the server at {url} refuses (status {status}): {reason}; correct that on the server, or lower --context"
        )
        self.reason = reason


@dataclass(frozen=True)
class Address:
    """The URL of a server and the name of a model: `http://HOST:PORT/v1#MODEL`. Without a name, its first model."""

    url: str
    model: str

    @classmethod
    def from_string(cls, text: str) -> "Address":
        """Parses an address.

        Raises: UsageError; also if it contains a password, which cards would show.
        """
        try:
            parts = urlsplit(text)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"{text!r} is not an address ({error}); write http://HOST:PORT/v1") from error
        if parts.username or parts.password or parts.query:
            public_url = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
            raise UsageError(f"{public_url} contains a key, which cards would show; set POTSTILL_API_KEY instead")
        if parts.scheme not in ("http", "https") or not host:
            raise UsageError(f"{text!r} is not the address of a server; write http://HOST:PORT/v1")
        return cls(parts._replace(fragment="").geturl().rstrip("/"), parts.fragment)


def is_address(name: str | None) -> bool:
    """Whether a model's name is a server's address."""
    return name is not None and re.match(r"https?://", name, re.IGNORECASE) is not None


class HttpClient:
    """Sends at most `max_concurrency` requests at once, and repeats those that fail (no answer, 429 or 5xx).

    The waits between tries grow. A key from the environment (`POTSTILL_API_KEY`, else `OPENAI_API_KEY`) is sent as a
    bearer token.

    Raises: MissingDependency without the extra `serve`.
    """

    def __init__(
        self, url: str, *, max_concurrency: int = MAX_CONCURRENCY, max_tries: int = MAX_TRIES, timeout: float = TIMEOUT
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingDependency("httpx is not installed; run: pip install 'potstill[serve]'") from error
        self.url, self._max_tries, self._transport_error = url, max_tries, httpx.TransportError
        self._api_key = next((os.environ[name] for name in API_KEY_VARIABLES if os.environ.get(name)), "")
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        limits = httpx.Limits(max_connections=max_concurrency, max_keepalive_connections=max_concurrency)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        self._slots = asyncio.Semaphore(max_concurrency)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="potstill-http", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _shut_down, self._client, self._loop, thread)

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> "Future[Any]":
        """Starts a coroutine in the client's thread, and returns its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def request(self, path: str, body: Any = None) -> Any:
        """Sends a GET, or a POST of `body`, and returns the parsed JSON answer.

        Raises: RequestRefused; ServerError after all tries, or for an answer that is not JSON.
        """
        async with self._slots:
            fault = ""
            for wait in [*compute_waits(self._max_tries), None]:
                try:
                    answer = await self._client.request("GET" if body is None else "POST", self.url + path, json=body)
                except self._transport_error as error:
                    fault, retry_after = type(error).__name__, 0.0
                else:
                    if answer.is_success:
                        return self._parse_json(answer)
                    fault, retry_after = (
                        f"status {answer.status_code}: {self._parse_reason(answer)}",
                        _parse_retry_after(answer),
                    )
                    if answer.status_code != 429 and answer.status_code < 500:
                        raise RequestRefused(self.url, answer.status_code, self._parse_reason(answer))
                if wait is not None:
                    await asyncio.sleep(min(max(wait, retry_after), MAX_WAIT))
        raise ServerError(
            f"the server at {self.url} gave no answer in {self._max_tries} tries ({fault}); restart it, and "
            f"continue a run that has a checkpoint with --resume"
        )

    def _parse_json(self, answer: Any) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise ServerError(f"the server at {self.url} gives an answer that is not JSON; is its path /v1?") from error

    def _parse_reason(self, answer: Any) -> str:
        """The server's message, without the key."""
        try:
            payload = answer.json()
            payload = payload.get("error", payload)
            reason = str(payload.get("message", payload) if isinstance(payload, dict) else payload)
        except (ValueError, AttributeError):
            reason = answer.text
        return (reason.replace(self._api_key, "***") if self._api_key else reason)[:300].strip() or "no reason"


def compute_waits(max_tries: int) -> list[float]:
    """The seconds to wait between tries."""
    return [min(FIRST_WAIT * 2**n, MAX_WAIT) for n in range(max_tries - 1)]


def _parse_retry_after(answer: Any) -> float:
    """The seconds to wait that a server demands in `Retry-After`; 0 if it does not."""
    header = answer.headers.get("retry-after", "")
    return float(header) if header.isdecimal() else 0.0


def _shut_down(client: Any, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Cancels all requests, closes all connections, and ends the thread."""

    async def shut_down_loop() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.aclose()
        loop.stop()

    loop.call_soon_threadsafe(lambda: loop.create_task(shut_down_loop()))
    if threading.current_thread() is not thread:
        thread.join(timeout=10)
        loop.close()
