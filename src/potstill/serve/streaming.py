"""Sends the events of a submission as server-sent events, and notices clients that leave."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse

from potstill.core.errors import PotstillError
from potstill.serve.errors import build_error, describe_error
from potstill.serve.worker import Submission

log = logging.getLogger("potstill")
T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LAST_EVENT = "data: [DONE]\n\n"


class ClientLeft(Exception):
    """The client has closed the connection before the answer was complete."""


class EventStream(StreamingResponse):
    """The response that streams `chunks`, and closes `submission` when it ends or the client leaves."""

    def __init__(self, submission: Submission, chunks: AsyncIterator[Mapping[str, Any]]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy passes on each chunk
        super().__init__(write_events(chunks), media_type="text/event-stream", headers=headers)
        self.submission = submission

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Streams until the end, or until the client leaves."""
        try:
            await run_while_connected(receive, self.stream_response(send))
        except ClientLeft:
            pass
        finally:
            self.submission.close()


async def write_events(chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[str]:
    """The chunks as server-sent events; an error becomes an event too, since the status has been sent."""
    try:
        async for chunk in chunks:
            yield write_event(chunk)
    except PotstillError as error:
        status, message, _ = describe_error(error)
        yield write_event(build_error(status, message))
    yield LAST_EVENT


def write_event(content: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


async def run_while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client leaves before.

    Raises: ClientLeft.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for future in (task, watch):
            future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns once the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def close_after(submission: Submission, receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work` on a submission, which is closed afterwards.

    Raises: ClientLeft.
    """
    try:
        return await run_while_connected(receive, work)
    finally:
        submission.close()
