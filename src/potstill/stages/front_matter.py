"""The YAML header of a model card, as model hubs read it: origin, data, license and measures."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from potstill.core.card import Card
from potstill.core.measure_table import MEASURES, QUALITIES
from potstill.stages.public_names import get_public_data_name

HUB_SOURCE = "hub: "  # in the provenance of a data set of the hub, before its id


def format_front_matter(card: Card, *, title: str = "") -> str:
    """The YAML header, with a license only if all parents state the same one.

    `base_model` has the ids on the hub of the models that the weights come from. `model-index` has the qualities of
    the model that the card calls `title`, and `datasets` the data sets that are on the hub.
    """
    origins = [parent for parent in card.parents if parent.role != "teacher"]
    base_models = list(dict.fromkeys(parent.hub_id for parent in origins if parent.hub_id))
    licenses = {parent.licence for parent in card.parents}
    data = ModelCardData(
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        base_model_relation="finetune" if base_models else None,
        datasets=list_hub_data(card) or None,
        language=list(dict.fromkeys(language for parent in origins for language in parent.languages)) or None,
        library_name="transformers",
        license=next(iter(licenses)) if len(licenses) == 1 else None,
        pipeline_tag="text-generation",
        tags=["potstill"],
        model_name=title or None,
        eval_results=list(_list_results(card, title)) or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


def list_hub_data(card: Card) -> list[str]:
    """The ids on the hub of the data sets that the card names, without revision and configuration; no local files."""
    ids = (get_hub_id(source["source"]) for source in list_sources(card.data))
    return list(dict.fromkeys(filter(None, ids)))


def list_sources(data: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The provenance of each data set of a card: of every part of a mixture, else of the one; empty if unknown."""
    provenance = data.get("provenance", {})
    sources: Sequence[Mapping[str, Any]] = provenance.get("sources", [provenance])
    return [source for source in sources if source.get("source")]


def get_hub_id(source: str) -> str:
    """`owner/name` of a data set of the hub; empty for other data."""
    return re.split("[@:]", source.removeprefix(HUB_SOURCE))[0] if source.startswith(HUB_SOURCE) else ""


def _list_results(card: Card, title: str) -> Iterator[EvalResult]:
    text = str(card.data.get("measured_on", "held-out text"))
    name = get_public_data_name(text.rpartition(" (")[0] or text)
    ids = list_hub_data(card) if len(list_sources(card.data)) == 1 else []
    for measure in card.measures.get(title, ()):
        if measure.name in QUALITIES and math.isfinite(measure.value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=ids[0] if ids else name,
                dataset_name=name,
                metric_type=measure.name,
                metric_value=measure.value,
                metric_name=MEASURES[measure.name].title,
            )
