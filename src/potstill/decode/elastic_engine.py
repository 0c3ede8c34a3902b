"""Decodes with the sizes of one model: the load at its start gives a text its size, which it keeps to its end.

Each size has an engine with keys and values of its own, since layers and heads differ. They share the weights.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from potstill.decode.engine import Engine
from potstill.decode.engine_stats import EngineStats
from potstill.decode.request import DecodeRequest, TokenEvent
from potstill.decode.size_schedule import SizeSchedule


class ElasticEngine:
    """An `Engine` for each size, the largest first; at most `slots` texts are in all of them together.

    A step is one step of each size that has texts, so while texts of several sizes are written, each waits for all.
    """

    def __init__(self, engines: Sequence[Engine], schedule: SizeSchedule, *, slots: int) -> None:
        self.engines, self.schedule, self.slots = engines, schedule, slots
        self._queue: deque[tuple[int, DecodeRequest]] = deque()
        self._events: list[TokenEvent] = []
        self._ids: list[dict[int, int]] = [{} for _ in engines]  # request ids, by the ids in each engine
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` would still give an event."""
        return bool(self._queue or self._events or any(engine.has_work for engine in self.engines))

    @property
    def num_active(self) -> int:
        """The number of texts in slots."""
        return sum(map(len, self._ids))

    @property
    def num_queued(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._queue)

    @property
    def stats(self) -> EngineStats:
        """The counts of all sizes together."""
        total = EngineStats()
        for engine in self.engines:
            for name, value in vars(engine.stats).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def add(self, request: DecodeRequest) -> int:
        """Queues a request; returns its id. Raises: UsageError as `Engine.add` does."""
        self.engines[0].check_request(request)
        self._queue.append((self._next_id, request))
        self._next_id += 1
        return self._next_id - 1

    def cancel(self, request_id: int) -> None:
        """Ends a request, queued or active; the next step gives its last event. An unknown id changes nothing."""
        queue_ids = [queued_id for queued_id, _ in self._queue]
        if request_id in queue_ids:
            del self._queue[queue_ids.index(request_id)]
            self._events.append(TokenEvent(request_id=request_id, token=None, finish_reason="cancelled"))
        for engine, ids in zip(self.engines, self._ids, strict=True):
            for engine_id in [engine_id for engine_id, active_id in ids.items() if active_id == request_id]:
                engine.cancel(engine_id)

    def step(self) -> list[TokenEvent]:
        """Gives waiting texts the size of the moment, and every text its next token; the events since the last step."""
        self._admit()
        events, self._events = self._events, []
        for engine, ids in zip(self.engines, self._ids, strict=True):
            for event in engine.step() if engine.has_work else ():
                events.append(replace(event, request_id=ids[event.request_id]))
                if event.finish_reason is not None:
                    del ids[event.request_id]
        return events

    def _admit(self) -> None:
        if not self._queue or self.num_active >= self.slots:
            return
        size = self.schedule.choose(self.num_active + len(self._queue))
        while self._queue and self.num_active < self.slots:
            request_id, request = self._queue.popleft()
            self._ids[size][self.engines[size].add(request)] = request_id
