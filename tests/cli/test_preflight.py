"""Cheap mistakes are found before any model is opened, by every verb, and one process at a time writes an output."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from tests.cli.conftest import KEEP, TINY, Call
from transformers import AutoModelForCausalLM

from potstill.cli.app import app
from potstill.core.output_lock import output_lock

Arguments = Callable[[object, object, object], tuple[object, ...]]

WRITERS: dict[str, Arguments] = {  # by verb: its call on a model, data and an output
    "distill": lambda model, data, out: ("--teacher", model, "--keep", KEEP, "--data", data, "--out", out, *TINY),
    "prune": lambda model, data, out: (model, "--keep", KEEP, "--data", data, "--out", out),
    "convert": lambda model, _, out: (model, "--to", "longer", "--out", out),
    "align": lambda model, data, out: (model, "--data", data, "--out", out),
    "edit": lambda model, data, out: (model, "--facts", data, "--out", out),
    "cache": lambda model, data, out: ("--teacher", model, "--data", data, "--out", out),
    "generate": lambda model, data, out: (model, "--data", data, "--out", out),
    "arena": lambda model, data, out: ("--teacher", model, "--keep", KEEP, "--data", data, "--out", out),
    "run": lambda model, data, out: ("minima", "--tiny", "--teacher", model, "--data", data, "--out", out),
    "measure": lambda model, data, out: (model, "--data", data, "--out", out),
    "frontier": lambda model, data, out: (model, "--out", out),
    "advise": lambda model, data, out: (model, "--data", data, "--out", out),
    "export": lambda model, _, out: (model, "--to", "hf", "--out", out),
}
READERS: dict[str, Arguments] = {
    "doctor": lambda model, data, _: ("--teacher", model, "--data", data),
    "plan": lambda model, data, _: ("--teacher", model, "--keep", KEEP, "--data", data),
    "serve": lambda model, _, __: (model,),
}
OPENERS = {**WRITERS, **READERS}


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is opened in these tests."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)


def test_every_verb_that_writes_is_tested_here() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    writers = {name for name, command in commands.items() if any(p.name == "out" for p in command.params)}
    assert writers == {*WRITERS, "plan"}  # a plan only looks at the room there


@pytest.mark.parametrize("verb", WRITERS)
def test_an_output_that_cannot_be_written_is_refused_first(
    verb: str, potstill: Call, teacher: Path, text: Path
) -> None:
    model: Path = measured(teacher) if verb == "frontier" else teacher
    answer = potstill(verb, *WRITERS[verb](model, text, "/proc/made"))
    assert answer.code == 1, answer.err
    assert "/proc/made" in answer.err
    assert "opened" not in answer.err


@pytest.mark.parametrize("verb", WRITERS)
def test_an_output_that_another_process_writes_is_refused_by_its_name(
    verb: str, potstill: Call, teacher: Path, text: Path, tmp_path: Path
) -> None:
    model: Path = measured(teacher) if verb == "frontier" else teacher
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    options = {name for p in command.params for name in p.opts}
    out = tmp_path / "made"
    with output_lock(out):
        for option in ({"--overwrite", "--resume"} & options) or {""}:
            answer = potstill(verb, *WRITERS[verb](model, text, out), *filter(None, [option]))
            assert answer.code == 1
            assert f"has been writing {out} since" in answer.err
    assert not out.exists()
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".made")] == []


@pytest.mark.parametrize("verb", OPENERS)
def test_a_model_or_data_that_is_not_there_is_refused_first(
    verb: str, potstill: Call, teacher: Path, text: Path, tmp_path: Path
) -> None:
    for model, data in ((tmp_path / "nowhere", text), (teacher, tmp_path / "nowhere.jsonl")):
        if data != text and verb in ("convert", "frontier", "serve", "export"):
            continue
        answer = potstill(verb, *OPENERS[verb](model, data, tmp_path / "made"))
        assert answer.code == 2, answer.err
        assert "nowhere" in answer.err


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (("measure", "smollm2", "--tasks", "arc_easy"), "lm_eval is not installed; run: pip install 'potstill[eval]'"),
        (("serve", "smollm2"), "fastapi is not installed; run: pip install 'potstill[serve]'"),
        (
            ("distill", "--teacher", "smollm2", "--keep", "0.5", "--out", "x", "--report-to", "wandb"),
            "wandb is not installed; run: pip install 'potstill[trackers]'",
        ),
    ],
)
def test_a_missing_extra_is_named_first(
    call: tuple[str, ...], advice: str, potstill: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.stages.preflight.find_spec", lambda _: None)
    answer = potstill(*call)
    assert answer.code == 1
    assert advice in answer.err


def test_a_disk_without_room_for_the_weights_is_refused_first(
    potstill: Call, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.stages.preflight.shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    for verb in ("distill", "prune"):
        answer = potstill(verb, *WRITERS[verb](teacher, text, tmp_path / "made"))
        assert answer.code == 1
        assert "make room, or choose another --out" in answer.err
        assert "opened" not in answer.err


def measured(folder: Path) -> Path:
    """A card with measures, as `frontier` reads it."""
    measures = [
        {"name": "bits_per_byte", "value": 1.0, "unit": "bits", "n": 1},
        {"name": "parameters", "value": 1e6, "unit": "1", "n": 1},
    ]
    card = {"parents": [], "measures": {"made": measures}}
    (folder / "card.json").write_text(json.dumps(card))
    return folder
