"""A model's measures, quality and cost, with the names and units that cards, tables and the frontier share.

| name | unit | better | over |
|---|---|---|---|
| `bits_per_byte` | bits/byte | lower | documents |
| `perplexity` | 1 | lower | documents |
| `teacher_kl` | nats/token | lower | documents |
| `teacher_agreement` | share | higher | documents |
| `rouge_l` | F1 x 100 | higher | prompts |
| `parameters`, `bytes` | parameters, B | lower | 1 |
| `prefill_tokens_per_second`, `decode_tokens_per_second` | tokens/s | higher | runs |
| `peak_memory` | B | lower | 1 |

Intervals of quality are 95 % bootstrap intervals over documents; those of speed are the slowest and the fastest run.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from potstill.core.errors import NotFound
from potstill.core.types import Measure
from potstill.evaluate.agreement import Comparison
from potstill.evaluate.bootstrap import interval, paired
from potstill.evaluate.latency import Trial, time_model
from potstill.evaluate.perplexity import Scores
from potstill.evaluate.rouge import Answers
from potstill.evaluate.size import bytes_in_memory, bytes_on_disk, count_parameters
from potstill.models.load import Loaded

Seen = Scores | Comparison


class Judged(NamedTuple):
    """A model's measures, with the scores by document and by prompt that those of quality come from."""

    measures: list[Measure]
    seen: Seen
    answers: Answers | None = None


def quality(seen: Seen) -> list[Measure]:
    """`bits_per_byte` and `perplexity`, and beside a teacher `teacher_kl` and `teacher_agreement`, with intervals."""
    scores = seen.scores if isinstance(seen, Comparison) else seen
    over = f"{scores.tokens.sum():,} tokens, {scores.sizes.sum():,} bytes; interval over documents"
    found = [
        _ratio("bits_per_byte", scores.nll / math.log(2), scores.sizes, "bits/byte"),
        _ratio("perplexity", scores.nll, scores.tokens, "1", transform=np.exp),
    ]
    if isinstance(seen, Comparison):
        found.append(_ratio("teacher_kl", seen.kl, scores.tokens, "nats/token"))
        found.append(_ratio("teacher_agreement", seen.agreed, scores.tokens, "share", better="higher"))
    return [replace(one, note=over) for one in found]


def rouge(answers: Answers) -> Measure:
    """`rouge_l` with its interval over prompts."""
    once = np.ones_like(answers.rouge_l)
    return _ratio("rouge_l", answers.rouge_l, once, "F1 x 100", better="higher")


def sizes(loaded: Loaded) -> list[Measure]:
    """`parameters` and `bytes`: on disk where the model lies there, else in memory."""
    counted, held = count_parameters(loaded.model), bytes_in_memory(loaded.model)
    apart = f"{counted.blocks:,} in blocks, {counted.embeddings:,} in embeddings"
    try:
        size, where = bytes_on_disk(loaded.path), f"on disk; {held / (1 << 20):,.0f} MiB in memory"
    except NotFound:
        size, where = held, "in memory"
    note = f"{loaded.note}, {where}" if loaded.note else where
    return [
        Measure("parameters", float(counted.total), "parameters", 1, note=apart),
        Measure("bytes", float(size), "B", 1, note=note),
    ]


def speeds(loaded: Loaded, trial: Trial | None = None) -> list[Measure]:
    """`prefill_tokens_per_second` and `decode_tokens_per_second`, medians with their range, and `peak_memory`."""
    speed = time_model(loaded.model, trial or Trial().within(loaded.model))
    timed = {"prefill_tokens_per_second": speed.prefill, "decode_tokens_per_second": speed.decode}
    found = [_median(name, runs, speed.conditions) for name, runs in timed.items()]
    return [*found, Measure("peak_memory", float(speed.peak_memory), "B", 1, note=speed.conditions)]


def differences(seen: Mapping[str, Seen]) -> list[dict[str, Any]]:
    """For every two models that scored the same text, a - b of each measure by the paired bootstrap over documents.

    `probability` is the share of draws in which a is below b.
    """
    return [
        {"name": name, "a": a, "b": b, **paired(ours, theirs, below)._asdict()}
        for (a, left), (b, right) in itertools.combinations(seen.items(), 2)
        for name, ours, theirs, below in comparable(left, right)
    ]


def comparable(left: Seen, right: Seen) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(measure, sums of one, sums of the other, what both are divided by), where both scored the same text."""
    a, b = (seen.scores if isinstance(seen, Comparison) else seen for seen in (left, right))
    if np.array_equal(a.sizes, b.sizes):
        yield "bits_per_byte", a.nll / math.log(2), b.nll / math.log(2), a.sizes.astype(float)
    if isinstance(left, Comparison) and isinstance(right, Comparison) and np.array_equal(a.tokens, b.tokens):
        yield "teacher_kl", left.kl, right.kl, a.tokens.astype(float)
        yield "teacher_agreement", left.agreed, right.agreed, a.tokens.astype(float)


def _ratio(
    name: str,
    above: np.ndarray,
    below: np.ndarray,
    unit: str,
    *,
    better: str = "lower",
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Measure:
    found = interval(above, below.astype(float), transform=transform)
    low, high = (None if math.isnan(bound) else bound for bound in (found.low, found.high))
    return Measure(name, found.value, unit, int((below > 0).sum()), better=better, low=low, high=high)


def _median(name: str, runs: np.ndarray, conditions: str) -> Measure:
    low, high = (float(runs.min()), float(runs.max())) if len(runs) > 1 else (None, None)
    note = f"{conditions}; range of the runs"
    return Measure(name, float(np.median(runs)), "tokens/s", len(runs), better="higher", low=low, high=high, note=note)
