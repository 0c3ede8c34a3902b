"""The frontier of everything that potstill made: cards and measurements in, one page and one picture out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.artefact import read_card, write_text
from potstill.core.errors import ArtefactError, NotFound
from potstill.evaluate import frontier, plots
from potstill.pipeline.beside import BEFORE

TEACHER = "teacher"


def draw_frontier(sources: Sequence[Path], out: Path, *, title: str = "Quality against cost") -> dict[str, Any]:
    """Writes `out` (HTML) and a PNG of the same name from finished folders and from JSON of `measure --out`.

    Raises: NotFound, ArtefactError for a source without measures; DataError if nothing can be drawn.
    """
    different = list({source.resolve(): source for source in sources}.values())
    points = frontier.points(apart(unique(card for source in different for card in cards(source))))
    picture = out.with_suffix(".png")
    write_text(out, frontier.page(points, title=title))
    plots.draw_frontier(points, picture, title=title)
    return {"files": [str(out), str(picture)], **frontier.document(points)}


def cards(source: Path) -> Iterator[Mapping[str, Any]]:
    """`{"name", "parent", "measures", "place"}` of every model that a folder or a file of measures speaks of.

    A card calls its teacher "teacher"; here it has its own name, since several folders may have several.
    """
    if source.is_dir():
        card = read_card(source)
        teacher = teacher_of(card)
        measured = {name: given for name, given in (card["measures"] or {}).items() if name != BEFORE}
        measures = {teacher if name == TEACHER else name: given for name, given in measured.items()}
        parents = dict.fromkeys(set(measures) - {teacher}, teacher)
    elif source.is_file():
        found = _read(source)
        measures, parents = found.get("models") or {}, found.get("lineage") or {}
    else:
        raise NotFound(f"there is no {source}; give folders that potstill finished, or JSON of `measure --out`")
    if not measures:
        raise ArtefactError(f"{source} holds no measures; run `potstill measure {source} --out measures.json` first")
    for name, given in measures.items():
        place = source.absolute() if source.is_dir() else source.absolute().with_suffix("") / name
        yield {"name": name, "parent": parents.get(name), "measures": given, "place": place}


def teacher_of(card: Mapping[str, Any]) -> str:
    """The name under which the teacher was loaded."""
    named = (parent["name"] for parent in card["parents"] if parent["role"].startswith(TEACHER))
    return next(named, TEACHER)


def unique(found: Iterator[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each model once, where it is sure to be the same one: a teacher stands in the card of every student of it."""
    kept: dict[Any, Mapping[str, Any]] = {}
    for number, card in enumerate(found):
        same = next((m for m in card["measures"] if m["name"] == "parameters"), None)
        kept.setdefault((card["name"], str(same) if card["parent"] is None else number), card)
    return list(kept.values())


def apart(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Students of one name are called by as much of their path as tells them apart: `first/distill`, say."""
    places: dict[str, list[Path]] = {}
    for card in found:
        if card["parent"] is not None:
            places.setdefault(card["name"], []).append(card["place"])
    return [card if len(places.get(card["name"], [])) < 2 else _longer(card, places[card["name"]]) for card in found]


def _longer(card: Mapping[str, Any], places: Sequence[Path]) -> Mapping[str, Any]:
    own = card["place"].parts
    for depth in range(1, len(own)):
        if sum(place.parts[-depth:] == own[-depth:] for place in places) == 1:
            return {**card, "name": "/".join(own[-depth:])}
    return card


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtefactError(f"{file} is no JSON of `measure --out` ({error})") from error
    return found
