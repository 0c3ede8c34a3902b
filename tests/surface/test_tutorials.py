"""What the tutorials show works: their commands parse, their files exist or are written, their Python runs."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from potstill.cli.app import app
from potstill.core.errors import UsageError
from potstill.objectives.user_file import load_divergence
from potstill.ops.divergence import forward_kl, reverse_kl

GROUP: Any = typer.main.get_command(app)
FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md"))}
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [match["text"] for match in BLOCK.finditer(PAGES[page]) if match["language"] == language]


def commands(page: str) -> list[str]:
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


POTSTILL = [
    pytest.param(page, line, id=f"{page}: {' '.join(line.split()[:3])}")
    for page in PAGES
    for line in commands(page)
    if line.startswith("potstill ")
]


def write_files(page: str, folder: Path) -> dict[str, str]:
    """Write the Python files of a page, whose first line is `# NAME.py: ...`, and return their texts."""
    files = {}
    for text in blocks(page, "python"):
        if match := re.match(r"# (\w+\.py): ", text):
            files[match[1]] = text
            (folder / match[1]).write_text(text)
    return files


@pytest.mark.parametrize(("page", "line"), POTSTILL)
def test_a_command_of_a_tutorial_parses(page: str, line: str) -> None:
    verb, *arguments = shlex.split(re.split(r" +[|>&]| +# ", line)[0])[1:]
    GROUP.commands[verb].make_context(verb, arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "index.md"])
def test_a_tutorial_writes_or_makes_every_file_that_it_reads(page: str, tmp_path: Path) -> None:
    assert any(line.startswith("potstill distill ") for line in commands(page))
    files = set(write_files(page, tmp_path))
    for line in commands(page):
        words = shlex.split(line)
        if words[:1] == ["python"]:
            assert words[1] in files
            files.add("pairs.jsonl")
        read = [words[i + 1] for i, word in enumerate(words) if word in ("--data", "--student", "--objective")]
        read += words[2:3] if words[1] in ("data", "generate", "serve") else []
        assert not {re.split("[:/]", name)[0] for name in read} - files - {"smollm2", "stdlib"}
        files |= {words[i + 1] for i, word in enumerate(words) if word == "--out"}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_tutorial_compiles(page: str) -> None:
    for text in blocks(page, "python"):
        compile(text, page, "exec")


def test_the_tutorial_on_data_writes_200_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = write_files("own-data.md", tmp_path).values()
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "make_pairs.py", "exec"), {})
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    assert all(row.keys() == {"prompt", "response"} and all(row.values()) for row in rows)


def test_the_loss_of_the_tutorial_is_jeffreys_divergence_and_its_mistake_is_refused(tmp_path: Path) -> None:
    write_files("own-loss.md", tmp_path)
    jeffreys = load_divergence(f"{tmp_path}/my_loss.py:jeffreys")
    assert jeffreys is not None
    teacher, student = torch.randn(2, 5, 11)
    for balance in (0.5, 0.2):
        expected = balance * forward_kl(teacher, student) + (1 - balance) * reverse_kl(teacher, student)
        torch.testing.assert_close(jeffreys(teacher, student, balance=balance), expected)
    with pytest.raises(UsageError) as error:
        load_divergence(f"{tmp_path}/my_loss.py:batch_mean")
    (shown,) = re.findall(r"^error: \S+:batch_mean (.+)$", PAGES["own-loss.md"], re.MULTILINE)
    assert str(error.value).endswith(shown)
