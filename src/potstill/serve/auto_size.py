"""Serves an elastic model with a size that follows the load."""

import logging
from dataclasses import dataclass

from potstill.core.elastic import find_size, format_share
from potstill.decode.elastic_engine import ElasticEngine
from potstill.decode.engine import Engine
from potstill.decode.runner import ModelRunner
from potstill.decode.size_schedule import SizeSchedule
from potstill.evaluate.pass_times import time_steps
from potstill.models.elastic import get_sizes, slice_model
from potstill.models.load import LoadedModel
from potstill.models.signals import probe_model

log = logging.getLogger("potstill")
PROMPT_TOKENS, RUNS = 32, 3  # of the steps that are timed at the start


@dataclass(frozen=True, kw_only=True)
class AutoSize:
    """The rule of `--size auto`: the largest size whose step takes at most `token_seconds` under the present load.

    By default those are the seconds of the largest size with a quarter of the slots in use.
    """

    token_seconds: float | None = None

    def make_engine(self, loaded: LoadedModel, *, slots: int, context: int) -> ElasticEngine:
        """An engine of all sizes, which share the weights of the loaded model. It times some steps of each first.

        Raises: UsageError for a model without sizes.
        """
        model, sizes = loaded.model, get_sizes(loaded.model)
        find_size(sizes, 1.0, loaded.name)
        probe_model(model)  # once for all sizes
        views = [model, *(slice_model(model, size.share) for size in sizes[1:])]
        runners = [ModelRunner(view, slots=slots, context=context, vocabulary=loaded.vocabulary) for view in views]
        schedule = self._make_schedule(runners, slots=slots, prompt=[0] * min(PROMPT_TOKENS, context - 1))
        parts = (
            f"{format_share(size.share)} ({1000 * schedule.estimate(n, slots):.0f} ms a token with {slots} texts)"
            for n, size in enumerate(sizes)
        )
        log.warning("note: sizes %s; new answers keep to %.0f ms a token", ", ".join(parts), 1000 * schedule.budget)
        return ElasticEngine([Engine(runner, loaded.tokenizer) for runner in runners], schedule, slots=slots)

    def _make_schedule(self, runners: list[ModelRunner], *, slots: int, prompt: list[int]) -> SizeSchedule:
        numbers = sorted({1, -(-slots // 4), slots})
        schedule = SizeSchedule([time_steps(runner, prompt, numbers, runs=RUNS) for runner in runners], 0.0)
        schedule.budget = self.token_seconds or schedule.estimate(0, -(-slots // 4))
        return schedule
