"""The YAML header of a model card, as model hubs read it: origin, data, license and measures."""

import math
from collections.abc import Iterator

from huggingface_hub import EvalResult, ModelCardData

from potstill.core.card import Card
from potstill.core.measure_table import MEASURES, QUALITIES
from potstill.stages.public_names import get_public_name

HUB_SOURCE = "hub: "  # in the provenance of a data set of the hub, before its id


def format_front_matter(card: Card, *, title: str = "") -> str:
    """The YAML header, with a license only if all parents state the same one.

    `base_model` has the ids on the hub of the models that the weights come from. `model-index` has the qualities of
    the model that the card calls `title`, and `datasets` the data set if it is one of the hub.
    """
    origins = [parent for parent in card.parents if parent.role != "teacher"]
    base_models = list(dict.fromkeys(parent.hub_id for parent in origins if parent.hub_id))
    licenses = {parent.licence for parent in card.parents}
    data = ModelCardData(
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        base_model_relation="finetune" if base_models else None,
        datasets=list(filter(None, [find_hub_data(card)])) or None,
        language=list(dict.fromkeys(language for parent in origins for language in parent.languages)) or None,
        library_name="transformers",
        license=next(iter(licenses)) if len(licenses) == 1 else None,
        pipeline_tag="text-generation",
        tags=["potstill"],
        model_name=title or None,
        eval_results=list(_list_results(card, title)) or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


def find_hub_data(card: Card) -> str:
    """The id on the hub of the data set that the card names; empty for other data."""
    source = str(card.data.get("provenance", {}).get("source", ""))
    return source.removeprefix(HUB_SOURCE).partition(":")[0] if source.startswith(HUB_SOURCE) else ""


def _list_results(card: Card, title: str) -> Iterator[EvalResult]:
    text = str(card.data.get("measured_on", "held-out text"))
    name = get_public_name(text.partition(" (")[0])
    for measure in card.measures.get(title, ()):
        if measure.name in QUALITIES and math.isfinite(measure.value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=find_hub_data(card) or name,
                dataset_name=name,
                metric_type=measure.name,
                metric_value=measure.value,
                metric_name=MEASURES[measure.name].title,
            )
