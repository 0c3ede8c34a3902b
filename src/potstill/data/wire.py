"""JSON over HTTP to one server, asked from a thread of its own: the caller computes while answers are under way."""

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

AT_ONCE = 16  # requests under way; more only wait in the server's queue
TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the second try, twice as many before each further one
TIMEOUT = 300.0  # seconds for an answer: a server may have many callers
KEYS = ("POTSTILL_API_KEY", "OPENAI_API_KEY")  # the first that is set is sent


class Refused(ServerError):
    """The server answered that it will not: asking again is of no use. `said` is its reason."""

    def __init__(self, url: str, status: int, said: str) -> None:
        super().__init__(
            f"the server at {url} refuses (status {status}): {said}; mend that there, or ask for less (--context)"
        )
        self.said = said


@dataclass(frozen=True)
class Address:
    """Where a server is, and which of its models is meant: `http://HOST:PORT/v1#MODEL`; without one, its first."""

    url: str
    model: str

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address that `text` is.

        Raises: UsageError; also where it holds a password, which would end up in cards.
        """
        try:
            parts = urlsplit(text)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"{text!r} is no address ({error}); write http://HOST:PORT/v1") from error
        if parts.username or parts.password or parts.query:
            shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
            raise UsageError(f"{shown} comes with a key in it, which cards would show; set POTSTILL_API_KEY instead")
        if parts.scheme not in ("http", "https") or not host:
            raise UsageError(f"{text!r} is no address of a server; write http://HOST:PORT/v1")
        return cls(parts._replace(fragment="").geturl().rstrip("/"), parts.fragment)


def is_address(name: str | None) -> bool:
    """Whether a model's name is a server's address."""
    return name is not None and re.match(r"https?://", name, re.IGNORECASE) is not None


class Wire:
    """At most `at_once` requests are under way; one that finds no answer, 429 or 5xx is tried again, later each time.

    A key is taken from the environment (`POTSTILL_API_KEY`, else `OPENAI_API_KEY`) and sent as a bearer token.

    Raises: MissingDependency without the extra `serve`.
    """

    def __init__(self, url: str, *, at_once: int = AT_ONCE, tries: int = TRIES, timeout: float = TIMEOUT) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingDependency("httpx is not installed; run: pip install 'potstill[serve]'") from error
        self.url, self._tries, self._lost = url, tries, httpx.TransportError
        self._key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        self._turns = asyncio.Semaphore(at_once)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="potstill-wire", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _close, self._client, self._loop, thread)

    def soon(self, asked: Coroutine[Any, Any, Any]) -> "Future[Any]":
        """Start `asked` on the wire's own thread; what it returns, later."""
        return asyncio.run_coroutine_threadsafe(asked, self._loop)

    async def ask(self, path: str, body: Any = None) -> Any:
        """What the server answers: to a GET, or to a POST of `body`.

        Raises: Refused; ServerError when all tries are used up, or for an answer that is no JSON.
        """
        async with self._turns:
            fault = ""
            for wait in [*waits(self._tries), None]:
                try:
                    answer = await self._client.request("GET" if body is None else "POST", self.url + path, json=body)
                except self._lost as error:
                    fault, later = type(error).__name__, 0.0
                else:
                    if answer.is_success:
                        return self._decoded(answer)
                    fault, later = f"status {answer.status_code}: {self._said(answer)}", _later(answer)
                    if answer.status_code != 429 and answer.status_code < 500:
                        raise Refused(self.url, answer.status_code, self._said(answer))
                if wait is not None:
                    await asyncio.sleep(min(max(wait, later), LONGEST_WAIT))
        raise ServerError(
            f"the server at {self.url} gave no answer in {self._tries} tries ({fault}); start it again, and continue "
            f"a run that has a checkpoint with --resume"
        )

    def _decoded(self, answer: Any) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise ServerError(f"the server at {self.url} answers what is no JSON; is its path /v1?") from error

    def _said(self, answer: Any) -> str:
        """The server's own words, without the key."""
        try:
            found = answer.json()
            found = found.get("error", found)
            words = str(found.get("message", found) if isinstance(found, dict) else found)
        except (ValueError, AttributeError):
            words = answer.text
        return (words.replace(self._key, "***") if self._key else words)[:300].strip() or "no reason"


def waits(tries: int) -> list[float]:
    """The seconds between so many tries."""
    return [min(FIRST_WAIT * 2**n, LONGEST_WAIT) for n in range(tries - 1)]


def _later(answer: Any) -> float:
    """The seconds that a server asks to be left alone."""
    said = answer.headers.get("retry-after", "")
    return float(said) if said.isdecimal() else 0.0


def _close(client: Any, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Give up what is under way, close all connections, and end the thread."""

    async def end() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await client.aclose()
        loop.stop()

    loop.call_soon_threadsafe(lambda: loop.create_task(end()))
    if threading.current_thread() is not thread:
        thread.join(timeout=10)
        loop.close()
