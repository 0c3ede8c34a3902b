"""Draws the frontier of finished folders and measurements, as an HTML page and a picture."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import write_text
from potstill.core.card import read_card
from potstill.core.errors import ArtifactError, NotFound
from potstill.core.output_lock import output_lock
from potstill.evaluate.charts import frontier, plots
from potstill.stages.training_run import BEFORE_TRAINING

TEACHER = "teacher"


def draw_frontier(sources: Sequence[Path], out: Path, *, title: str = "Quality against cost") -> dict[str, Any]:
    """Write `out` (HTML) and a PNG of the same name from finished folders and JSON files of `measure --out`.

    Raises: NotFound; ArtifactError for a source without measures; DataError if there is nothing to draw.
    """
    unique_sources = list({source.resolve(): source for source in sources}.values())
    points = frontier.build_points(
        disambiguate_names(merge_duplicates(card for source in unique_sources for card in read_cards(source)))
    )
    picture = out.with_suffix(".png")
    with output_lock(out):
        write_text(out, frontier.render_html(points, title=title))
        plots.draw_frontier(points, picture, title=title)
    return {"files": [str(out), str(picture)], **frontier.to_chart_data(points)}


def read_cards(source: Path) -> Iterator[Mapping[str, Any]]:
    """`{"name", "parent", "measures", "place"}` of every model in a folder's card or a file of measures.

    A card calls its teacher "teacher"; here it gets its own name, since the folders may have different teachers.

    Raises: NotFound; ArtifactError for a source without measures.
    """
    if source.is_dir():
        card = read_card(source)
        teacher = get_teacher_name(card)
        card_measures = {
            name: model_measures for name, model_measures in (card["measures"] or {}).items() if name != BEFORE_TRAINING
        }
        measures = {
            teacher if name == TEACHER else name: model_measures for name, model_measures in card_measures.items()
        }
        parents = dict.fromkeys(set(measures) - {teacher}, teacher)
    elif source.is_file():
        document = _read_json(source)
        measures, parents = document.get("models") or {}, document.get("lineage") or {}
    else:
        raise NotFound(
            f"there is no {source}; give folders that potstill has finished, or JSON files of `measure --out`"
        )
    if not measures:
        raise ArtifactError(f"{source} has no measures; run `potstill measure {source} --out measures.json` first")
    for name, model_measures in measures.items():
        place = source.absolute() if source.is_dir() else source.absolute().with_suffix("") / name
        yield {"name": name, "parent": parents.get(name), "measures": model_measures, "place": place}


def get_teacher_name(card: Mapping[str, Any]) -> str:
    """The name by which the teacher was loaded."""
    names = (parent["name"] for parent in card["parents"] if parent["role"].startswith(TEACHER))
    return next(names, TEACHER)


def merge_duplicates(model_cards: Iterator[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Keep each teacher once, since the card of each of its students holds it: models of one name and one size."""
    unique_cards: dict[Any, Mapping[str, Any]] = {}
    for number, card in enumerate(model_cards):
        parameters = next((m for m in card["measures"] if m["name"] == "parameters"), None)
        unique_cards.setdefault((card["name"], str(parameters) if card["parent"] is None else number), card)
    return list(unique_cards.values())


def disambiguate_names(model_cards: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rename students with equal names to the shortest part of their path that differs, such as `first/distill`."""
    places: dict[str, list[Path]] = {}
    for card in model_cards:
        if card["parent"] is not None:
            places.setdefault(card["name"], []).append(card["place"])
    return [
        card if len(places.get(card["name"], [])) < 2 else _qualify_name(card, places[card["name"]])
        for card in model_cards
    ]


def _qualify_name(card: Mapping[str, Any], places: Sequence[Path]) -> Mapping[str, Any]:
    parts = card["place"].parts
    for depth in range(1, len(parts)):
        if sum(place.parts[-depth:] == parts[-depth:] for place in places) == 1:
            return {**card, "name": "/".join(parts[-depth:])}
    return card


def _read_json(file: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{file} is not a JSON file of `measure --out` ({error})") from error
    return document
