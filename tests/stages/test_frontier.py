"""The chart of what lies in folders and files: each model once, under its own name, with what it was made from."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from potstill.core.card import Card, Parent
from potstill.core.errors import ArtifactError, DataError, NotFound
from potstill.core.measure import Measure
from potstill.stages.frontier import draw_frontier


def measures(bits: float, parameters: float) -> list[Measure]:
    return [
        Measure("bits_per_byte", bits, "bits/byte", 9),
        Measure("parameters", parameters, "parameters", 1),
    ]


def folder(out: Path, teacher: str, *, size: float = 100.0, digest: str = "1", kl: float | None = None) -> Path:
    out.mkdir()
    data = {"measured_digest": digest, "measured_on": f"text {digest}, 9 documents"}
    parents = [Parent(role="student", name="cut", digest="1"), Parent(role="teacher", name=teacher, digest="0")]
    found = {"teacher": measures(1.0, size), out.name: measures(1.5, 50.0)}
    if kl is not None:
        found = {name: [*values, Measure("teacher_kl", kl, "nats/token", 9)] for name, values in found.items()}
    Card(stage={}, seed=1, parents=parents, measures=found, data=data).write(out)
    return out


def measured(path: Path, digest: str | None, *, prompts: int = 0) -> Path:
    """A file of `measure --out` with one model, called as the file."""
    values = [*measures(2.0, 10.0), *([Measure("rouge_l", 9.0, "F1 x 100", prompts)] if prompts else [])]
    data = {"name": "D", "split": "all", "documents": 9, "measured_digest": digest} if digest else {}
    document = {"models": {path.stem: [m.to_dict() for m in values]}, "lineage": {path.stem: "large"}, "data": data}
    path.write_text(json.dumps(document))
    return path


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
    sources = [folder(tmp_path / "a", "large"), measured(tmp_path / "x.json", "1")]
    found = draw_frontier(sources, tmp_path / "chart.html")
    assert lineage(found) == {"large": None, "a": "large", "x": "large"}
    assert found["text"] == "text 1, 9 documents"


@pytest.mark.parametrize("other", ["2", None])
def test_models_that_were_measured_on_other_documents_are_refused(tmp_path: Path, other: str | None) -> None:
    sources = [folder(tmp_path / "a", "large"), measured(tmp_path / "x.json", other)]
    name = "D (all), 9 documents" if other else "a text that is not recorded"
    with pytest.raises(DataError, match=re.escape(f"large, a on text 1, 9 documents; x on {name}")):
        draw_frontier(sources, tmp_path / "chart.html")
    assert not (tmp_path / "chart.html").exists()


def test_documents_that_no_card_records_are_drawn_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_frontier([measured(tmp_path / f"{name}.json", None) for name in "xy"], tmp_path / "chart.html")
    assert "no card says on which documents" in capsys.readouterr().err


def test_qualities_that_mean_different_things_are_left_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_teacher = [folder(tmp_path / name, "large", kl=0.5) for name in "ab"]
    assert "teacher_kl" in draw_frontier(one_teacher, tmp_path / "chart.html")["qualities"]
    assert capsys.readouterr().err == ""
    many = [measured(tmp_path / f"{n}.json", "1", prompts=n) for n in (20, 50)]
    found = draw_frontier([*one_teacher, folder(tmp_path / "c", "other", kl=0.5), *many], tmp_path / "chart.html")
    assert found["qualities"] == ["bits_per_byte"]
    notes = capsys.readouterr().err
    assert "2 different teachers" in notes
    assert "20 and 50 prompts" in notes


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no"):
        draw_frontier([tmp_path / "nothing.json"], tmp_path / "chart.html")
    Card(stage={}, seed=1).write(tmp_path)
    with pytest.raises(ArtifactError, match="has no measures"):
        draw_frontier([tmp_path], tmp_path / "chart.html")
