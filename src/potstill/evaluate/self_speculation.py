"""Searches the layers that a model skips to draft for itself, on its own answers to prompts and by its own times."""

from collections.abc import Sequence

from potstill.core.errors import UsageError
from potstill.core.screen import status
from potstill.decode.runner import ModelRunner
from potstill.evaluate.draft_matches import DraftMatches, match_model, predict_rows
from potstill.evaluate.pass_times import time_passes
from potstill.evaluate.scoring_windows import ScoringConfig
from potstill.evaluate.skip_search import SkipCosts, SkipSearch
from potstill.evaluate.target_text import write_target_rows
from potstill.models.inference import get_max_context
from potstill.models.layer_view import count_layers, keep_layers
from potstill.models.load import LoadedModel


def search_layers(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    longest: int,
    max_evaluations: int,
) -> SkipSearch:
    """The finished search, with drafts of at most `longest` tokens; the model answers each prompt once.

    Raises: UsageError for a model of one layer; DataError without an answer of two tokens.
    """
    num_layers = count_layers(loaded.model)
    if num_layers < 2:
        raise UsageError(f"{loaded.name} has one layer, so none can be skipped; choose a deeper model")
    with status("writing the model's own answers"):
        rows = write_target_rows(loaded, prompts, max_new_tokens=max_new_tokens)
    scoring = ScoringConfig(context=get_max_context(loaded.model), vocabulary=loaded.vocabulary)
    reference = predict_rows(loaded.model, rows, scoring)

    def match(skipped: frozenset[int]) -> DraftMatches:
        draft = keep_layers(loaded.model, [layer for layer in range(num_layers) if layer not in skipped])
        return match_model(draft, rows, scoring, longest=longest, reference=reference)

    costs = measure_costs(loaded, rows[0].input_ids, num_layers=num_layers, longest=longest)
    with status("searching layers to skip", total=max_evaluations) as advance:
        search = SkipSearch(match, costs, max_evaluations=max_evaluations, report=advance)
        search.run()
    return search


def measure_costs(loaded: LoadedModel, text: Sequence[int], *, num_layers: int, longest: int) -> SkipCosts:
    """The times of steps with all layers and with one, behind `text`, and of verifying drafts up to `longest` tokens.

    A line through both steps gives those of any other number of layers.
    """
    prompt = text[: get_max_context(loaded.model) - longest - 1]
    runner = ModelRunner(loaded.model, vocabulary=loaded.vocabulary)
    shallow_runner = ModelRunner(keep_layers(loaded.model, [0]), vocabulary=loaded.vocabulary)
    seconds = time_passes(runner, prompt, range(1, longest + 2))
    one_layer = time_passes(shallow_runner, prompt, [1])[1] / seconds[1]
    return SkipCosts(
        num_layers=num_layers,
        base=max(0.0, one_layer - (1 - one_layer) / (num_layers - 1)),
        verify={length: seconds[length + 1] / seconds[1] for length in range(1, longest + 1)},
    )
