"""Measures how several models rank the answers of preferences, compared with the model that they were aligned from."""

from collections.abc import Mapping
from typing import Any

from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.screen import track
from potstill.core.types import REFERENCE, move_batch
from potstill.data.packing import Packs, collate, pack
from potstill.data.preference_tokens import PreferenceCounts, list_sides, tokenize_groups
from potstill.data.preferences import load_preferences
from potstill.evaluate.measures import measure_size, measure_speed
from potstill.evaluate.preferences import compare_preferences, score_preferences
from potstill.evaluate.scoring_windows import check_context
from potstill.models.load import LoadedModel
from potstill.stages.align.references import check_same_text
from potstill.stages.console import print_note
from potstill.stages.corpus import load_data
from potstill.stages.options import MeasureOptions
from potstill.stages.run_models import load_run_model
from potstill.stages.text_options import make_rendering, prepare_tokenizer


def measure_preferences(config: MeasureOptions, stage: Mapping[str, Any]) -> dict[str, Any]:
    """The measures of the models by name, differences of every two, and the data, as `measure` returns them.

    Raises: VocabularyMismatch for a model that reads other tokens than the reference; DataError for data without
        preferences; UsageError for a context that a model has not.
    """
    assert config.reference is not None
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device_type=str(device))
    reference = load_run_model(config, config.reference)
    prepare_tokenizer(reference.tokenizer, config)
    reference.model.to(device)
    packs, counts, data = read_packs(config, reference)
    measures, scores = {}, {}
    for number, name in enumerate(config.models, 1):
        print_note(f"measuring model {number} of {len(config.models)}: {name}")
        loaded = load_run_model(config, name)
        check_same_text(reference, loaded, network=REFERENCE, has_template=config.chat_template is not None)
        check_context(config.context, loaded.model, reference.model)
        loaded.model.to(device)
        batches = (move_batch(collate([packs[i]]), device) for i in track(range(len(packs)), "preferences"))
        scores[name] = score_preferences(
            loaded.model, reference.model, batches, vocabulary=loaded.vocabulary, dtype=dtype
        )
        speed = measure_speed(loaded) if config.speed else []
        measures[name] = [*scores[name].measure(), *measure_size(loaded), *speed]
    return {
        "models": {name: [m.to_dict() for m in model_measures] for name, model_measures in measures.items()},
        "paired": compare_preferences(scores),
        "data": {**data, **counts.to_dict()},
        "stage": dict(stage),
    }


def read_packs(config: MeasureOptions, reference: LoadedModel) -> tuple[Packs, PreferenceCounts, dict[str, Any]]:
    """The preferences of one split in packs, their counts, and the facts of the data."""
    corpus = load_data(config, split=config.split, load=load_preferences)
    documents = corpus.documents.take(config.documents)
    groups = (list_sides(number, document) for number, document in enumerate(documents))
    tokenized = tokenize_groups(
        corpus, groups, reference.tokenizer, rendering=make_rendering(config), length=config.context
    )
    data = {"name": corpus.name, "digest": corpus.digest, "documents": config.documents, **corpus.provenance}
    return pack(tokenized.tokens, length=config.context), tokenized.counts, data
