"""Measures how a model uses a long context, on the documents of a corpus, and draws the result."""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from potstill.core.errors import UsageError
from potstill.core.measure import Measure
from potstill.data.corpus import Corpus
from potstill.evaluate.charts.long_context import draw_long_context
from potstill.evaluate.long_context import (
    LongContext,
    NeedleConfig,
    cut_long_windows,
    probe_needle,
    score_by_position,
)
from potstill.evaluate.measures import ModelEvaluation, measure_long_context
from potstill.evaluate.perplexity import get_bos_id
from potstill.evaluate.scoring_windows import ScoringConfig, check_context
from potstill.models.load import LoadedModel
from potstill.stages.options import MeasureOptions


def check_lengths(options: MeasureOptions) -> None:
    """Refuse windows and texts that are too short to tell near from far.

    Raises: UsageError.
    """
    for name in ("positions", "needle"):
        if getattr(options, name) and getattr(options, name) < 64:
            raise UsageError(f"--{name} is {getattr(options, name)}; give at least 64 tokens, or 0 to leave it out")


def check_inputs(options: MeasureOptions, corpus: Corpus, model: PreTrainedModel) -> None:
    """Refuse lengths beyond the context of `model`, and a corpus of chats for long contexts.

    Raises: UsageError.
    """
    for name in ("context", "positions", "needle"):
        check_context(getattr(options, name), model, option=f"--{name}")
    if (options.positions or options.needle) and corpus.kind != "text":
        raise UsageError(f"--positions and --needle read plain texts, and {corpus.name} has chats; give other --data")


def evaluate_long_context(
    loaded: LoadedModel, corpus: Corpus, options: MeasureOptions, scoring: ScoringConfig
) -> tuple[LongContext, list[Measure]]:
    """What `options` request of `--positions` and `--needle`, and the measures of it.

    Raises: DataError for documents that are too short; UnsupportedModel for a tokenizer without bytes.
    """
    if not (options.positions or options.needle):
        return LongContext(), []
    bos = get_bos_id(loaded.tokenizer)
    documents = list(_tokenize(corpus, loaded, options.documents))
    result = LongContext()
    if options.positions:
        windows = cut_long_windows(documents, options.positions, limit=options.documents, bos=bos)
        result = result._replace(positions=score_by_position(loaded.model, loaded.tokenizer, windows, scoring))
    if options.needle:
        config, filler = NeedleConfig(tokens=options.needle), list(chain.from_iterable(documents))
        cells = probe_needle(loaded.model, loaded.tokenizer, filler, config, scoring, bos=bos)
        result = result._replace(needle=cells)
    return result, measure_long_context(result)


def describe_long_context(evaluations: Mapping[str, ModelEvaluation]) -> dict[str, Any]:
    """`positions` and `needle` by model as plain data, of those that were measured."""
    results = {name: evaluation.long_context for name, evaluation in evaluations.items()}
    positions = {name: result.positions.to_rows() for name, result in results.items() if result.positions}
    needle = {name: [cell.to_dict() for cell in result.needle] for name, result in results.items() if result.needle}
    return {name: table for name, table in (("positions", positions), ("needle", needle)) if table}


def draw_result(result: Mapping[str, Any], picture: Path) -> None:
    """Write `picture` if the result of `measure` has a part that can be drawn."""
    if "positions" in result or "needle" in result:
        draw_long_context(result.get("positions", {}), result.get("needle", {}), picture)


def _tokenize(corpus: Corpus, loaded: LoadedModel, limit: int) -> Iterator[list[int]]:
    for document in corpus.documents.take(limit):
        yield list(loaded.tokenizer(document["text"], add_special_tokens=False, verbose=False).input_ids)
