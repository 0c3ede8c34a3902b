"""Draws the frontier of finished folders and measurements, as an HTML page and a picture.

All models on a chart were measured on the same documents. Sources with other documents are refused, and a quality that
depends on something else which differs, such as the teacher of a KL, is left off the chart.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import write_text
from potstill.core.card import BEFORE_TRAINING, read_card
from potstill.core.errors import ArtifactError, DataError, NotFound
from potstill.core.measure_table import QUALITIES
from potstill.core.output_lock import output_lock
from potstill.evaluate.charts import frontier
from potstill.stages.console import print_note

TEACHER = "teacher"
TEACHER_QUALITIES = ("teacher_kl", "teacher_agreement", "acceptance")
PROMPT_QUALITIES = ("rouge_l",)
LONG_QUALITIES = ("long_bits_per_byte", "needle_accuracy")
SPEED = "decode_tokens_per_second"


def draw_frontier(sources: Sequence[Path], out: Path, *, title: str = "Quality against cost") -> dict[str, Any]:
    """Write `out` (HTML) and pictures of its name from finished folders and JSON files of `measure --out`.

    One PNG shows the quality against parameters. Another one, `NAME-speed.png`, shows it against the decoding speed,
    where that was measured.

    Raises: NotFound; ArtifactError for a source without measures; DataError if there is nothing to draw, or if models
    were measured on different documents.
    """
    unique_sources = list({source.resolve(): source for source in sources}.values())
    cards = [card for source in unique_sources for card in read_cards(source)]
    text = check_texts(cards)
    cards = drop_incomparable(disambiguate_names(merge_duplicates(cards)))
    points = frontier.build_points(cards)
    data = frontier.to_chart_data(points)
    pictures = {out.with_suffix(".png"): data["costs"][0]}
    if data["costs"][0] != SPEED and any(point.has_measures(SPEED, data["quality"]) for point in points):
        pictures[out.with_name(f"{out.stem}-speed.png")] = SPEED
    from potstill.evaluate.charts import plots  # here, so that a wrong source is refused before matplotlib is read

    with output_lock(out):
        write_text(out, frontier.render_html(points, title=title))
        for picture, cost in pictures.items():
            plots.draw_frontier(points, picture, costs=[cost], title=title)
    return {"files": [str(file) for file in (out, *pictures)], "text": text, **data}


def read_cards(source: Path) -> Iterator[Mapping[str, Any]]:
    """Name, parent, measures, place, text and teacher of every model in a folder's card or a file of measures.

    `text` is the digest of the documents that were measured, and what they are called. `teacher` is that of the KL. A
    card calls its teacher "teacher"; here it gets its own name, since the folders may have different teachers.

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
        data = card.get("data") or {}
        text, kl_teacher = (data.get("measured_digest"), data.get("measured_on")), str(teacher)
    elif source.is_file():
        document = _read_json(source)
        measures, parents = document.get("models") or {}, document.get("lineage") or {}
        text, kl_teacher = _read_text(document), str((document.get("stage") or {}).get("teacher"))
    else:
        raise NotFound(
            f"there is no {source}; give folders that potstill has finished, or JSON files of `measure --out`"
        )
    if not measures:
        raise ArtifactError(f"{source} has no measures; run `potstill measure {source} --out measures.json` first")
    for name, model_measures in measures.items():
        place = source.absolute() if source.is_dir() else source.absolute().with_suffix("") / name
        facts = {"place": place, "text": text, "teacher": kl_teacher}
        yield {"name": name, "parent": parents.get(name), "measures": model_measures, **facts}


def get_teacher_name(card: Mapping[str, Any]) -> str:
    """The name by which the teacher was loaded."""
    names = (parent["name"] for parent in card["parents"] if parent["role"].startswith(TEACHER))
    return next(names, TEACHER)


def _read_text(document: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The digest of the documents of a file of measures, and what they are called."""
    data = document.get("data") or {}
    if not data:
        return None, None
    answers = ", their last answers" if (document.get("stage") or {}).get("train_on") == "last" else ""
    label = f"{data.get('name')} ({data.get('split')}), {data.get('documents')} documents{answers}"
    return data.get("measured_digest"), label


def check_texts(model_cards: Sequence[Mapping[str, Any]]) -> str | None:
    """What the documents are called that all models were measured on; None where no card says.

    Raises: DataError if there are several, with the models of each.
    """
    names: dict[str | None, list[str]] = {}
    labels: dict[str | None, str] = {}
    for card in model_cards:
        if any(measure["name"] in QUALITIES for measure in card["measures"]):
            digest, label = card["text"]
            names.setdefault(digest, []).append(card["name"])
            labels.setdefault(digest, label or "a text that is not recorded")
    if len(names) > 1:
        groups = "; ".join(f"{', '.join(dict.fromkeys(names[digest]))} on {labels[digest]}" for digest in names)
        raise DataError(
            f"the models were measured on {len(names)} different texts, which no axis can compare: {groups}; measure "
            f"them together with `potstill measure MODEL... --data DATA --out measures.json`, and draw that file"
        )
    if set(names) == {None} and len(model_cards) > 1:
        print_note("no card says on which documents its models were measured; compare them only if they are the same")
    return next((label for digest, label in labels.items() if digest is not None), None)


def drop_incomparable(model_cards: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The cards without qualities whose values mean different things, which a note names.

    These are KL to several teachers, ROUGE-L on several numbers of prompts, and long contexts of several lengths.
    """
    dropped: list[str] = []
    teachers = {card["teacher"] for card in model_cards if _find_measures(card, TEACHER_QUALITIES)}
    if len(teachers) > 1:
        dropped += TEACHER_QUALITIES
        print_note(f"KL and agreement are left off the chart: they refer to {len(teachers)} different teachers")
    prompts = {measure["n"] for card in model_cards for measure in _find_measures(card, PROMPT_QUALITIES)}
    if len(prompts) > 1:
        dropped += PROMPT_QUALITIES
        print_note(
            f"ROUGE-L is left off the chart: it was measured on {' and '.join(map(str, sorted(prompts)))} prompts"
        )
    for name in LONG_QUALITIES:
        lengths = {measure["note"] for card in model_cards for measure in _find_measures(card, (name,))}
        if len(lengths) > 1:
            dropped.append(name)
            print_note(f"{name} is left off the chart: it was measured on {len(lengths)} different lengths")
    return [{**card, "measures": [m for m in card["measures"] if m["name"] not in dropped]} for card in model_cards]


def _find_measures(card: Mapping[str, Any], names: Sequence[str]) -> list[Mapping[str, Any]]:
    return [measure for measure in card["measures"] if measure["name"] in names]


def merge_duplicates(model_cards: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
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
