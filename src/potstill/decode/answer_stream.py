"""One answer, event by event, with its counts and its speed."""

from collections.abc import Iterator
from typing import Any

from potstill.decode.engine import Engine
from potstill.decode.engine_stats import EngineStats
from potstill.decode.request import Completion, DecodeRequest, TokenEvent
from potstill.models.eval_mode import eval_mode


class AnswerStream:
    """The answer of `engine` to `request`: iterate over its events. Nothing else may be in the engine meanwhile.

    The text and the counts are those so far. `num_accepted` counts the tokens of the text that a drafter proposed.
    """

    def __init__(self, engine: Engine, request: DecodeRequest) -> None:
        self.request, self.completion = request, Completion()
        self.stats, self.num_accepted = EngineStats(), 0
        self._engine, self._is_cancelled = engine, False

    def __iter__(self) -> Iterator[TokenEvent]:
        """The events, until the answer has ended."""
        engine = self._engine
        engine.stats = self.stats
        request_id = engine.add(self.request)
        with eval_mode(engine.runner.model):
            try:
                while engine.has_work:
                    if self._is_cancelled:
                        engine.cancel(request_id)
                    for event in engine.step():
                        self.completion.add(event)
                        self.num_accepted += event.drafted
                        yield event
            finally:
                engine.cancel(request_id)
                engine.step()

    def cancel(self) -> None:
        """Ends the answer before the next step of the engine; a signal handler may call this at any time."""
        self._is_cancelled = True

    @property
    def text(self) -> str:
        """The text so far."""
        return self.completion.text

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens per second after the first one, which comes with the prompt; None without a second one."""
        return (self.stats.tokens - 1) / self.stats.seconds if self.stats.steps else None

    @property
    def prompt_tokens_per_second(self) -> float | None:
        """Tokens of the prompt that were read, per second; None if none was."""
        return self.stats.prompt_tokens / self.stats.prompt_seconds if self.stats.prompt_tokens else None

    @property
    def tokens_per_pass(self) -> float | None:
        """New tokens after the first one per pass of the model; 1 without drafts, None without a pass."""
        return (self.stats.tokens - 1) / self.stats.steps if self.stats.steps else None

    def to_dict(self) -> dict[str, Any]:
        """The text and its numbers, for JSON."""
        return {
            "text": self.text,
            "finish_reason": self.completion.finish_reason,
            "prompt_tokens": len(self.request.prompt),
            "new_tokens": len(self.completion.tokens),
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_pass": self.tokens_per_pass,
            "drafted": self.stats.drafted,
            "accepted": self.num_accepted,
        }
