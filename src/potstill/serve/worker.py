"""One thread steps the engine; requests of asyncio reach it through a bounded inbox, and receive its events."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from potstill.core.errors import PotstillError, UsageError
from potstill.decode.elastic_engine import ElasticEngine
from potstill.decode.engine import Engine
from potstill.decode.request import Completion, DecodeRequest, TokenEvent
from potstill.serve.errors import AnswerTimeout, EngineFailure, ServerBusy, ServerStopping
from potstill.serve.metrics import ServerMetrics

log = logging.getLogger("potstill")
FINISH_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort"}  # the engine's, and vLLM's
MAX_FAILURES = 3  # steps in a row that fail, until the engine counts as broken
MAX_WAIT = 30.0  # seconds that Retry-After asks a client to wait, at most
JOIN_SECONDS = 10.0  # for the last step at the end


class Submission:
    """The answers to one HTTP request, and their events as they come. Call `close` after use."""

    def __init__(self, worker: "EngineWorker", requests: Sequence[DecodeRequest], timeout: float) -> None:
        self.requests = requests
        self.engine_ids: list[int] = []  # of the worker's thread
        self.num_open = len(requests)
        self.loop = asyncio.get_running_loop()
        self.start = time.perf_counter()
        self._worker, self._timeout, self._is_closed = worker, timeout, False
        self._deadline = self.loop.time() + timeout
        self._items: asyncio.Queue[tuple[int, TokenEvent] | Exception] = asyncio.Queue()

    def put(self, item: tuple[int, TokenEvent] | Exception) -> int:
        """Hands over an event, or the error that ends all answers; returns how many answers it ended."""
        ended = self.num_open if isinstance(item, Exception) else int(item[1].finish_reason is not None)
        self.num_open -= ended
        self._items.put_nowait(item)
        return ended

    async def read_events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """(index of the answer, event) until every answer has ended.

        Raises: AnswerTimeout; EngineFailure, UsageError from the engine.
        """
        num_open = len(self.requests)
        while num_open:
            try:
                async with asyncio.timeout_at(self._deadline):
                    item = await self._items.get()
            except TimeoutError as error:
                raise AnswerTimeout(
                    f"the answer was not complete within {self._timeout:g} seconds; ask for fewer tokens, or start the "
                    f"server with a larger --timeout"
                ) from error
            if isinstance(item, Exception):
                raise item
            num_open -= item[1].finish_reason is not None
            yield item

    async def read_completions(self) -> list[Completion]:
        """The whole answers, in the order of the requests.

        Raises: as `read_events`.
        """
        completions = [Completion() for _ in self.requests]
        async for index, event in self.read_events():
            completions[index].add(event)
        return completions

    def close(self) -> None:
        """Cancels the answers that have not ended, which frees their slots."""
        if not self._is_closed:
            self._is_closed = True
            if self.num_open:
                self._worker.cancel(self)


@dataclass
class Progress:
    """An answer in the engine: whose it is, and when its request and its last token came."""

    submission: Submission
    index: int
    last_time: float | None = None


class EngineWorker:
    """Owns the engine. At most `max_answers` answers are in it or wait, and each must be complete in `timeout` seconds.

    `start` begins the thread; `drain` and `stop` end it. All other methods belong to asyncio's thread.
    """

    def __init__(
        self, engine: Engine | ElasticEngine, metrics: ServerMetrics, *, max_answers: int, timeout: float
    ) -> None:
        self.max_answers, self.timeout, self.metrics = max_answers, timeout, metrics
        self.num_answers = 0  # in the engine or waiting for it
        self.is_draining = self.is_broken = False
        self._engine, self._num_failures = engine, 0
        self._mean_seconds = 1.0  # of an answer
        self._progress: dict[int, Progress] = {}  # by the engine's id
        self._inbox: list[Callable[[], object]] = []
        self._condition, self._is_stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.track(metrics.running, lambda: engine.num_active)
        metrics.track(metrics.waiting, lambda: max(self.num_answers - engine.num_active, 0))

    def start(self) -> None:
        """Begins the thread."""
        self._thread.start()

    def submit(self, requests: Sequence[DecodeRequest]) -> Submission:
        """Queues the answers to one HTTP request.

        Raises: ServerBusy if not all of them have room now; UsageError if they never have; ServerStopping,
        EngineFailure.
        """
        if self.is_draining:
            raise ServerStopping("the server is shutting down; try another one")
        if self.is_broken:
            raise EngineFailure("the engine has failed several times; restart the server, whose log has the errors")
        if len(requests) > self.max_answers:
            raise UsageError(
                f"the request asks for {len(requests)} answers, and this server takes {self.max_answers} at once; send "
                f"fewer prompts, or start it with a larger --max-queue"
            )
        if self.num_answers + len(requests) > self.max_answers:
            self.metrics.count_rejection()
            raise ServerBusy(
                f"{self.num_answers} answers are being generated or wait, and this server takes {self.max_answers}; "
                f"try again later",
                wait=min(self._mean_seconds, MAX_WAIT),
            )
        submission = Submission(self, requests, self.timeout)
        self.num_answers += len(requests)
        self._post(partial(self._add, submission))
        return submission

    def cancel(self, submission: Submission) -> None:
        """Ends the answers of a submission that have not ended."""
        self._post(partial(self._cancel, submission))

    async def drain(self, grace: float) -> None:
        """Refuses new requests, waits `grace` seconds for the answers that are being generated, and cuts the rest."""
        self.is_draining = True
        deadline = time.perf_counter() + grace
        while self.num_answers and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)
        self._post(self._cancel_all)

    def stop(self) -> None:
        """Ends the thread after its current step."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)

    def _post(self, command: Callable[[], object]) -> None:
        """Lets the worker's thread call `command`."""
        with self._condition:
            self._inbox.append(command)
            self._condition.notify()

    # the methods below belong to the worker's thread

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._inbox or self._is_stopping or self._has_work)
                commands, self._inbox = self._inbox, []
                if self._is_stopping:
                    return
            for command in commands:
                command()
            if self._has_work:
                self._step()

    @property
    def _has_work(self) -> bool:
        return self._engine.has_work and not self.is_broken

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:
            self._fail(error)
            return
        self._num_failures = 0
        self._deliver([item for event in events if (item := self._track(event)) is not None])
        stats = self._engine.stats
        self.metrics.set_draft_tokens(stats.drafted, stats.accepted)

    def _track(self, event: TokenEvent) -> tuple[Submission, tuple[int, TokenEvent]] | None:
        """The event with the submission it belongs to, after the metrics have it; None if nobody waits for it."""
        progress = self._progress.get(event.request_id)
        if progress is None:
            return None
        now, submission = time.perf_counter(), progress.submission
        if event.token is not None:
            self.metrics.count_token(
                now - (progress.last_time or submission.start), is_first=progress.last_time is None
            )
            progress.last_time = now
        if event.finish_reason is not None:
            del self._progress[event.request_id]
            seconds = now - submission.start
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
            num_prompt_tokens = len(submission.requests[progress.index].prompt)
            self.metrics.count_answer(FINISH_REASONS[event.finish_reason], num_prompt_tokens, seconds)
        return submission, (progress.index, event)

    def _add(self, submission: Submission) -> None:
        for index, request in enumerate(submission.requests):
            try:
                engine_id = self._engine.add(request)
            except PotstillError as error:
                self._cancel(submission)
                self._drop(submission, error)
                return
            submission.engine_ids.append(engine_id)
            self._progress[engine_id] = Progress(submission, index)

    def _cancel(self, submission: Submission) -> None:
        for engine_id in submission.engine_ids:
            if engine_id in self._progress:
                self._engine.cancel(engine_id)

    def _cancel_all(self) -> None:
        for engine_id in list(self._progress):
            self._engine.cancel(engine_id)

    def _fail(self, error: Exception) -> None:
        """Ends all answers with an error, and frees the engine of them."""
        log.error("the engine failed: %s: %s", type(error).__name__, error, exc_info=error)
        self._num_failures += 1
        self.is_broken = self._num_failures >= MAX_FAILURES
        failure = EngineFailure(f"the engine failed ({type(error).__name__}); the server's log has the details")
        submissions = {id(progress.submission): progress.submission for progress in self._progress.values()}
        try:
            self._cancel_all()
        except Exception:
            log.exception("the engine cannot be cleared; it is broken")
            self.is_broken = True
        for submission in submissions.values():
            self._drop(submission, failure)

    def _drop(self, submission: Submission, error: Exception) -> None:
        for engine_id in submission.engine_ids:
            self._progress.pop(engine_id, None)
        self._deliver([(submission, error)])

    def _deliver(self, items: Sequence[tuple[Submission, Any]]) -> None:
        """Hands items over to asyncio's thread, in one call for each of its loops."""
        for loop in {submission.loop for submission, _ in items}:
            batch = [item for item in items if item[0].loop is loop]
            try:
                loop.call_soon_threadsafe(self._receive, batch)
            except RuntimeError:  # the loop is closed, and nobody waits
                return

    def _receive(self, items: Sequence[tuple[Submission, Any]]) -> None:
        """Takes items over in asyncio's thread."""
        for submission, item in items:
            self.num_answers -= submission.put(item)
