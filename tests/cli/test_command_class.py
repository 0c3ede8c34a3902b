"""What every command does with its arguments: repeated options, files of --config, names of Hugging Face."""

from pathlib import Path
from typing import Any

import pytest
import typer.main

from potstill.cli.app import app
from potstill.core.errors import UsageError

GROUP: Any = typer.main.get_command(app)
CONFIG_COMMANDS = ("distill", "plan", "prune", "measure", "generate", "arena", "doctor", "run", "cache")


def read(verb: str, *arguments: str) -> dict[str, Any]:
    params: dict[str, Any] = GROUP.commands[verb].make_context(verb, list(arguments)).params
    return params


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distill", "--out", "a", "--lr", "1e-3", "--lr", "1e-4"), "--lr is given 2 times; give it once"),
        (("cache", "--out", "a", "--out", "b"), "--out is given 2 times"),
        (("distill", "--out", "a", "--per_device_train_batch_size", "4"), "potstill counts tokens: give micro_tokens"),
        (("distill", "--out", "a", "--bf16"), "give dtype=bfloat16"),
    ],
)
def test_a_repeated_or_foreign_option_is_answered(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(*arguments)


def test_options_that_repeat_and_names_of_hugging_face_are_taken() -> None:
    params = read(
        "distill", "--data", "a:0.3", "--data", "b:0.7", "--learning_rate", "1e-3", "--output-dir=o", "--resume"
    )
    assert (params["data"], params["lr"], params["out"], params["resume"]) == (["a:0.3", "b:0.7"], 1e-3, "o", True)


@pytest.mark.parametrize("verb", CONFIG_COMMANDS)
def test_every_command_that_trains_or_measures_has_a_config(verb: str) -> None:
    assert "--config" in {flag for option in GROUP.commands[verb].params for flag in option.opts}


def test_a_file_gives_what_the_command_line_does_not(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("models: student\noutput_dir: m.json\ndata: [a, b]\ndocuments: 7\nspeed: false\n")
    params = read("measure", "--config", str(file), "--documents", "9")
    assert (params["models"], params["out"], params["data"]) == (["student"], "m.json", ["a", "b"])
    assert (params["documents"], params["speed"]) == (9, False)
    file.write_text("out: made\nkeep: 0.5\nmodel: m\n")
    assert read("prune", "--config", str(file), "--params", "60M") | {"keep": None} == read(
        "prune", "m", "--out", "made", "--params", "60M"
    )
    file.write_text("out: made\nteacher: t\n")
    assert read("distill", "--config", str(file))["out"] == "made"
    assert read("cache", "--config", str(file))["teacher"] == ["t"]
    file.write_text("objectives: [cross_entropy, jsd]\nout: o\n")
    assert read("arena", "--config", str(file))["objectives"] == "cross_entropy,jsd"
    file.write_text("colour: red\n")
    with pytest.raises(UsageError, match="names 'colour', which is not an option"):
        read("measure", "--config", str(file), "a")
