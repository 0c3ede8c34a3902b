"""Times passes of a model over new tokens on this machine: a plain step reads one, and verification reads a draft."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from potstill.decode.runner import ModelRunner
from potstill.ops.acceptance import divide_by_cost

RUNS = 8


@dataclass(frozen=True, kw_only=True)
class PassCosts:
    """The cost of a draft token, and that of verifying drafts by their length; a plain step of the target costs 1."""

    draft: float
    verify: Mapping[int, float]

    def predict(self, mean_tokens: float, draft_length: int) -> float:
        """The speed relative to plain decoding, with these tokens per pass."""
        return divide_by_cost(mean_tokens, draft_length, self.draft, self.verify[draft_length])


def time_passes(
    runner: ModelRunner, prompt: Sequence[int], widths: Sequence[int], *, runs: int = RUNS
) -> dict[int, float]:
    """The median seconds of a pass over each number of new tokens behind `prompt`; all widths take turns."""
    return _time_shapes(runner, prompt, {width: (1, width) for width in widths}, runs)


def time_steps(
    runner: ModelRunner, prompt: Sequence[int], counts: Sequence[int], *, runs: int = RUNS
) -> dict[int, float]:
    """The median seconds of a step that gives each of so many texts a token behind `prompt`; all counts take turns."""
    return _time_shapes(runner, prompt, {count: (count, 1) for count in counts}, runs)


def _time_shapes(
    runner: ModelRunner, prompt: Sequence[int], shapes: Mapping[int, tuple[int, int]], runs: int
) -> dict[int, float]:
    """The median seconds of a pass over each shape of new tokens, [texts, tokens]."""
    slots = range(max(texts for texts, _ in shapes.values()))
    for slot in slots:
        runner.prefill(slot, prompt)
    seconds: dict[int, list[float]] = {name: [] for name in shapes}
    for run in range(runs + 1):
        for name, shape in shapes.items():
            tokens = torch.full(shape, prompt[-1], device=runner.device)
            start = time.perf_counter()
            logits = runner.forward(slots[: shape[0]], tokens).logits
            logits.argmax(-1).tolist()  # a device has finished once tokens are here
            if run:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    for slot in slots:
        runner.free(slot)
    return {name: statistics.median(values) for name, values in seconds.items()}
