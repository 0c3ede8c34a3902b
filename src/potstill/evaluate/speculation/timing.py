"""Measures the speed of decoding without drafts and with several, in turns on the same prompts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import NamedTuple

from potstill.core.screen import status
from potstill.decode.engine import Engine
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.speculative import Speculation


class TimedText(NamedTuple):
    """The new tokens of a text; `seconds` are those of the last `num_timed`, without the step that read the prompt."""

    tokens: Sequence[int]
    num_timed: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MeasuredSpeed:
    """The speed over all prompts in tokens per second, with the median time of each text, and the texts.

    The speed is 0 where all texts end with the step that reads their prompt.
    """

    tokens_per_second: float
    texts: Sequence[Sequence[int]]

    def find_differences(self, other: "MeasuredSpeed") -> list[tuple[int, int]]:
        """(text, token) of the first token of each text that differs from the other's."""
        differences = []
        for number, pair in enumerate(zip(self.texts, other.texts, strict=True)):
            matches = [a == b for a, b in zip_longest(*pair)]
            if not all(matches):
                differences.append((number, matches.index(False)))
        return differences


def measure_speeds(
    runner: ModelRunner, requests: Sequence[DecodeRequest], speculations: Sequence[Speculation], *, runs: int
) -> tuple[MeasuredSpeed, list[MeasuredSpeed]]:
    """(the speed of plain decoding, that of each speculation); all write each text in turn, `runs` times."""
    sides: list[Speculation | None] = [None, *speculations]
    texts: list[list[list[TimedText]]] = [[[] for _ in requests] for _ in sides]
    with status("measuring speed-ups", total=runs * len(requests) * len(sides)) as advance:
        for _ in range(runs):
            for number, request in enumerate(requests):
                for side, side_texts in zip(sides, texts, strict=True):
                    side_texts[number].append(time_text(runner, request, side))
                    advance()
    plain, *speeds = map(summarize_speed, texts)
    return plain, speeds


def time_text(runner: ModelRunner, request: DecodeRequest, speculation: Speculation | None) -> TimedText:
    """Writes a text; a drafter remembers no text before."""
    if speculation is not None:
        speculation.drafter.forget()
    engine = Engine(runner, speculation=speculation)
    engine.add(request)
    tokens: list[int] = []
    while not tokens:
        tokens += step(engine)
    num_untimed, start = len(tokens), time.perf_counter()
    while engine.has_work:
        tokens += step(engine)
    return TimedText(tokens, len(tokens) - num_untimed, time.perf_counter() - start)


def step(engine: Engine) -> list[int]:
    """The new tokens of a step."""
    return [event.token for event in engine.step() if event.token is not None]


def summarize_speed(texts: Sequence[Sequence[TimedText]]) -> MeasuredSpeed:
    """The speed of one side; `texts[i]` are the runs of text i."""
    num_tokens = sum(runs[0].num_timed for runs in texts)
    seconds = sum(median(run.seconds for run in runs) for runs in texts)
    return MeasuredSpeed(
        tokens_per_second=num_tokens / seconds if num_tokens else 0.0, texts=[runs[0].tokens for runs in texts]
    )
