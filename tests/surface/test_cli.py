"""The command line as strangers meet it: the verbs, quick help with examples that work as printed, and its version."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.text import Text
from typer.testing import CliRunner

from potstill.cli.app import app

ROOT = Path(__file__).parents[2]
MAKING = ("models", "data", "doctor", "plan", "distill", "align", "prune", "convert", "edit")
USING = ("generate", "advise", "serve", "run", "recipes", "export", "push", "cache")
VERBS = (*MAKING, "measure", "frontier", "arena", *USING)
GROUP: Any = typer.main.get_command(app)
EXAMPLE = re.compile(r"Example: \[bold\](.+?)\[/\]", re.DOTALL)
SPENDS = ("distill", "align", "prune", "convert", "edit", "arena", "cache", "run")


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    call = [sys.executable, "-m", "potstill", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=60, env=environment)


def examples(verb: str) -> list[str]:
    return EXAMPLE.findall(GROUP.commands[verb].callback.__doc__)


def test_the_verbs_are_these() -> None:
    assert tuple(GROUP.commands) == VERBS


@pytest.mark.parametrize("verb", ["", "distill"])
def test_help_is_quick(verb: str) -> None:
    done = run_quickly(lambda: program(*([verb] if verb else []), "--help"))
    assert (done.returncode, done.stderr) == (0, "")


def run_quickly(run: Callable[[], subprocess.CompletedProcess[str]]) -> subprocess.CompletedProcess[str]:
    """What `run` leaves, which takes ten times the import of Typer and Rich at most; the first of three may compile."""
    for _ in range(3):
        _, floor = measure_seconds(
            lambda: subprocess.run([sys.executable, "-c", "import typer, rich.table"], check=True)
        )
        done, seconds = measure_seconds(run)
        if seconds < 10 * floor:
            return done
    pytest.fail(f"{done.args} takes {seconds:.1f} seconds, and the import of Typer and Rich {floor:.2f}")


def measure_seconds(
    run: Callable[[], subprocess.CompletedProcess[Any]],
) -> tuple[subprocess.CompletedProcess[Any], float]:
    """What `run` leaves, and the seconds of the processor that its processes took."""
    before = os.times()
    done = run()
    after = os.times()
    return done, after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str) -> None:
    shown = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1"}).invoke(app, [verb, "--help"])
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert f"Example: potstill {verb}" in shown.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_parses(verb: str) -> None:
    assert examples(verb)
    for example in examples(verb):
        name, chosen, *arguments = shlex.split(example)
        assert (name, chosen) == ("potstill", verb)
        GROUP.commands[verb].make_context(verb, arguments)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_is(verb: str) -> None:
    silent = [p.name for p in GROUP.commands[verb].params if not getattr(p, "help", None) and p.name != "help"]
    assert not silent


@pytest.mark.parametrize("verb", VERBS)
def test_a_help_text_is_shown_with_its_brackets(verb: str) -> None:
    texts = [getattr(p, "help", None) or "" for p in GROUP.commands[verb].params]
    assert [Text.from_markup(text).plain for text in texts] == [text.replace("\\[", "[") for text in texts]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_answers_machines_and_what_spends_can_be_rehearsed(verb: str) -> None:
    options = {option for parameter in GROUP.commands[verb].params for option in parameter.opts}
    assert "--json" in options
    if verb in SPENDS:
        assert {"--dry-run", "--seed", "--overwrite"} <= options


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = program("--version")
    assert (done.returncode, done.stdout) == (0, project["version"] + "\n")


def test_without_a_verb_it_shows_its_help() -> None:
    done = program()
    assert done.returncode == 0
    assert "distill" in done.stdout


@pytest.mark.parametrize(
    "call", [("recipes",), ("models",), ("frontier", "nowhere"), ("push", "nowhere", "you/student")], ids=" ".join
)
def test_what_lists_or_draws_is_quick_and_brings_no_torch(call: tuple[str, ...]) -> None:
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from potstill.cli.app import main; main()"
    line = [sys.executable, "-c", code, *call]
    done = run_quickly(lambda: subprocess.run(line, capture_output=True, text=True, timeout=60))
    assert not {"torch", "transformers", "datasets", "matplotlib"} & set(done.stdout.split())
    assert done.returncode == 0 or done.stderr.startswith("error: ")


def test_import_is_quick_and_brings_no_torch() -> None:
    code = "import sys, time; t = time.perf_counter(); import potstill; print(time.perf_counter() - t, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    seconds, *modules = done.stdout.split()
    assert float(seconds) < 0.3
    assert not {"torch", "transformers", "numpy", "fastapi", "httpx"} & set(modules)
