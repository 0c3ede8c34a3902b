"""What the README shows works: its Python runs, its commands parse."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from potstill.cli.app import app

GROUP: Any = typer.main.get_command(app)
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


COMMANDS = [line for block in blocks("") for line in block.splitlines() if line.startswith("potstill ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_parses(line: str) -> None:
    verb, *arguments = shlex.split(re.split(r" {2,}", line)[0])[1:]
    GROUP.commands[verb].make_context(verb, arguments)


def test_all_verbs_are_shown() -> None:
    assert {line.split()[1] for line in COMMANDS} | {"recipes"} == set(GROUP.commands)


@pytest.mark.slow
def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (example,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    short = example.replace("tokens=200_000", "tokens=4_096")
    assert short != example
    exec(compile(short, "README.md", "exec"), {})
    assert "bits_per_byte" in capsys.readouterr().out
    assert (tmp_path / "student" / "model.safetensors").is_file()
