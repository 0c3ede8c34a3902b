"""Measures a model: quality on documents and prompts, size and speed. Names and units are those of `MEASURES`.

`n` of a measure counts documents for bits per byte, perplexity and the comparison with a teacher, prompts for ROUGE-L,
windows and trials for long contexts, and runs for speed.
Intervals of quality are 95 % bootstrap intervals over documents; those of speed are the slowest and fastest run.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from potstill.core.errors import NotFound
from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES
from potstill.evaluate.agreement import TeacherComparison
from potstill.evaluate.bootstrap import measure_ratio, paired_bootstrap
from potstill.evaluate.latency import LatencyConfig, time_model
from potstill.evaluate.long_context import LongContext
from potstill.evaluate.perplexity import Scores
from potstill.evaluate.rouge import ScoredAnswers
from potstill.evaluate.size import count_bytes_in_memory, count_parameters
from potstill.models.load import LoadedModel
from potstill.models.weight_files import count_bytes_on_disk

TextScores = Scores | TeacherComparison


class ModelEvaluation(NamedTuple):
    """A model's measures, and the scores by document and by prompt that its qualities are computed from."""

    measures: list[Measure]
    text_scores: TextScores
    answers: ScoredAnswers | None = None
    long_context: LongContext = LongContext()


def measure_quality(text_scores: TextScores) -> list[Measure]:
    """`bits_per_byte` and `perplexity`, with a teacher also the measures of `_measure_comparison`, with intervals."""
    scores = text_scores.scores if isinstance(text_scores, TeacherComparison) else text_scores
    note = f"{scores.num_tokens.sum():,} tokens, {scores.num_bytes.sum():,} bytes; interval over documents"
    measures = [
        measure_ratio("bits_per_byte", scores.nll / math.log(2), scores.num_bytes),
        measure_ratio("perplexity", scores.nll, scores.num_tokens, transform=np.exp),
    ]
    measures = [replace(measure, note=note) for measure in measures]
    return [*measures, *_measure_comparison(text_scores)] if isinstance(text_scores, TeacherComparison) else measures


def _measure_comparison(comparison: TeacherComparison) -> list[Measure]:
    """`teacher_kl`, `teacher_agreement` and `acceptance`, with the template that wrote the text in the note."""
    parts = (f"{comparison.num_tokens.sum():,} tokens", comparison.note, "interval over documents")
    sums = {
        "teacher_kl": comparison.kl,
        "teacher_agreement": comparison.top1_matches,
        "acceptance": comparison.acceptance,
    }
    return [
        replace(measure_ratio(name, values, comparison.num_tokens), note="; ".join(part for part in parts if part))
        for name, values in sums.items()
    ]


def measure_rouge(answers: ScoredAnswers) -> Measure:
    """`rouge_l` with its interval over prompts."""
    return measure_ratio("rouge_l", answers.rouge_l)


def measure_long_context(result: LongContext) -> list[Measure]:
    """`long_bits_per_byte` and `needle_accuracy`, of those that were measured; intervals over windows and trials."""
    measures = []
    if (positions := result.positions) is not None:
        measure = measure_ratio("long_bits_per_byte", positions.nll[:, -1] / math.log(2), positions.num_bytes[:, -1])
        start, stop = positions.edges[-2:]
        measures.append(replace(measure, note=f"positions {start:,} to {stop:,}; interval over windows"))
    if result.needle:
        trials = np.array([cell.hits for cell in result.needle], dtype=float).mean(0)
        measure = measure_ratio("needle_accuracy", trials)
        lengths = sorted({cell.length for cell in result.needle})
        measures.append(replace(measure, note=f"texts of {lengths[0]:,} to {lengths[-1]:,} tokens; chance 1/8"))
    return measures


def measure_size(loaded: LoadedModel) -> list[Measure]:
    """`parameters`, `bytes` and `bfloat16_bytes`.

    `bytes` are those on disk if the model was loaded from there, else those in memory. `bfloat16_bytes` are those of
    the parameters at two bytes each, so that models saved at different precisions compare.
    """
    counts, memory_bytes = count_parameters(loaded.model), count_bytes_in_memory(loaded.model)
    breakdown = f"{counts.blocks:,} in blocks, {counts.embeddings:,} in embeddings"
    try:
        num_bytes, location = (
            count_bytes_on_disk(loaded.path),
            f"on disk; {memory_bytes / (1 << 20):,.0f} MiB in memory",
        )
    except NotFound:
        num_bytes, location = memory_bytes, "in memory"
    note = f"{loaded.note}, {location}" if loaded.note else location
    return [
        MEASURES["parameters"].build(float(counts.total), 1, note=breakdown),
        MEASURES["bytes"].build(float(num_bytes), 1, note=note),
        MEASURES["bfloat16_bytes"].build(2.0 * counts.total, 1, note=f"two bytes a parameter; {note}"),
    ]


def measure_speed(loaded: LoadedModel, latency_config: LatencyConfig | None = None) -> list[Measure]:
    """`prefill_tokens_per_second` and `decode_tokens_per_second`, medians with their range, and `peak_memory`."""
    speed = time_model(loaded.model, latency_config or LatencyConfig().limit_to_context(loaded.model))
    runs_by_name = {"prefill_tokens_per_second": speed.prefill, "decode_tokens_per_second": speed.decode}
    measures = [_build_median_measure(name, runs, speed.conditions) for name, runs in runs_by_name.items()]
    return [*measures, MEASURES["peak_memory"].build(float(speed.peak_memory), 1, note=speed.conditions)]


def compute_paired_differences(scores_by_model: Mapping[str, TextScores]) -> list[dict[str, Any]]:
    """For every two models scored on the same text, a - b of each measure by the paired bootstrap over documents.

    `probability` is the share of draws with a < b.
    """
    return [
        {"name": name, "a": a, "b": b, **paired_bootstrap(first_sums, second_sums, denominators)._asdict()}
        for (a, first), (b, second) in itertools.combinations(scores_by_model.items(), 2)
        for name, first_sums, second_sums, denominators in iterate_comparable_sums(first, second)
    ]


def iterate_comparable_sums(
    first: TextScores, second: TextScores
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(measure, sums of the first, sums of the second, denominators of both) of every measure on the same text."""
    a, b = (
        text_scores.scores if isinstance(text_scores, TeacherComparison) else text_scores
        for text_scores in (first, second)
    )
    if np.array_equal(a.num_bytes, b.num_bytes):
        yield "bits_per_byte", a.nll / math.log(2), b.nll / math.log(2), a.num_bytes.astype(float)
    if (
        isinstance(first, TeacherComparison)
        and isinstance(second, TeacherComparison)
        and np.array_equal(first.num_tokens, second.num_tokens)
    ):
        yield "teacher_kl", first.kl, second.kl, first.num_tokens.astype(float)
        yield "teacher_agreement", first.top1_matches, second.top1_matches, first.num_tokens.astype(float)


def _build_median_measure(name: str, runs: np.ndarray, conditions: str) -> Measure:
    low, high = (float(runs.min()), float(runs.max())) if len(runs) > 1 else (None, None)
    note = f"{conditions}; range of the runs"
    return MEASURES[name].build(float(np.median(runs)), len(runs), low=low, high=high, note=note)
