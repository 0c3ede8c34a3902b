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
    short = example.replace('tokens="200k"', 'tokens="4k"')
    assert short != example
    exec(compile(short, "README.md", "exec"), {})
    assert "bits per byte" in capsys.readouterr().out
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_the_python_example_runs_on_other_models_and_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tiny_llama: Any,
    tiny_tokenizer: Any,
) -> None:
    (example,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    names = {"teacher": (tiny_llama, tiny_tokenizer), "rows": [{"text": f"{n} stills boil"} for n in range(40)]}
    changes = {'"smollm2"': "teacher", '"stdlib"': "rows, context=32, batch_tokens=64, documents=4", '"200k"': "128"}
    for old, new in changes.items():
        assert old in example
        example = example.replace(old, new)
    exec(compile(example, "README.md", "exec"), names)
    output = capsys.readouterr()
    assert "bits per byte" in output.out
    assert "Warning" not in output.err
    assert str(tmp_path.parent) not in (tmp_path / "student" / "card.json").read_text()
