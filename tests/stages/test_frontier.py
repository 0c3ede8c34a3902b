"""The chart of what lies in folders and files: each model once, under its own name, with what it was made from."""

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.core.card import Card, Parent
from potstill.core.errors import ArtifactError, DataError, NotFound
from potstill.core.types import Measure
from potstill.stages.frontier import draw_frontier


def measures(bits: float, parameters: float) -> list[Measure]:
    return [
        Measure("bits_per_byte", bits, "bits/byte", 9),
        Measure("parameters", parameters, "parameters", 1),
    ]


def folder(out: Path, teacher: str, *, size: float = 100.0) -> Path:
    out.mkdir()
    parents = [Parent(role="student", name="cut", digest="1"), Parent(role="teacher", name=teacher, digest="0")]
    found = {"teacher": measures(1.0, size), out.name: measures(1.5, 50.0)}
    Card(stage={}, seed=1, parents=parents, measures=found).write(out)
    return out


def lineage(found: dict[str, Any]) -> dict[str, str | None]:
    return {model["name"]: model["parent"] for model in found["models"]}


def test_students_of_two_teachers_stand_beside_their_own(tmp_path: Path) -> None:
    sources = [folder(tmp_path / "a", "large"), folder(tmp_path / "b", "large"), folder(tmp_path / "c", "other")]
    found = draw_frontier(sources, tmp_path / "chart.html")
    assert lineage(found) == {"large": None, "a": "large", "b": "large", "other": None, "c": "other"}
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "large" in (tmp_path / "chart.html").read_text()


def test_students_of_one_name_are_called_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    sources = [folder(tmp_path / "first" / "a", "large"), folder(tmp_path / "second" / "a", "large")]
    found = draw_frontier([*sources, sources[0]], tmp_path / "chart.html")
    assert lineage(found) == {"large": None, "first/a": "large", "second/a": "large"}


def test_two_teachers_of_one_name_are_refused(tmp_path: Path) -> None:
    sources = [folder(tmp_path / "a", "large"), folder(tmp_path / "b", "large", size=7.0)]
    with pytest.raises(DataError, match="two models have the name 'large'"):
        draw_frontier(sources, tmp_path / "chart.html")
    assert not (tmp_path / "chart.html").exists()


def test_a_file_of_measures_is_a_source_too(tmp_path: Path) -> None:
    plain = {"models": {"x": [m.to_dict() for m in measures(2.0, 10.0)]}, "lineage": {"x": "large"}}
    (tmp_path / "measures.json").write_text(json.dumps(plain))
    found = draw_frontier([folder(tmp_path / "a", "large"), tmp_path / "measures.json"], tmp_path / "chart.html")
    assert lineage(found) == {"large": None, "a": "large", "x": "large"}


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no"):
        draw_frontier([tmp_path / "nothing.json"], tmp_path / "chart.html")
    Card(stage={}, seed=1).write(tmp_path)
    with pytest.raises(ArtifactError, match="has no measures"):
        draw_frontier([tmp_path], tmp_path / "chart.html")
