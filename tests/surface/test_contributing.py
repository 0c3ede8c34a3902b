"""The objective in CONTRIBUTING.md works as printed, and as a package it is planned, checked and carded."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import potstill
from potstill.core.errors import UsageError
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.registry import list_objective_names
from potstill.objectives.user_file import list_plugins

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = {
    match[1]: match[0].partition("\n")[2].removesuffix("```")
    for match in re.finditer(r"^```python\n# (\w+\.py).*?^```", TEXT, re.MULTILINE | re.DOTALL)
}
ENTRY_POINTS = """[potstill.objectives]
confident = confident:Confident
absent = no_such_package:Nothing
text = confident:__name__
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files of the page, as an installed package."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    folder = tmp_path / "confident-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: confident\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    list_plugins.cache_clear()
    yield tmp_path
    list_plugins.cache_clear()


def test_the_tests_of_the_example_pass(package: Path) -> None:
    assert set(FILES) == {"confident.py", "test_confident.py"}
    tests = [
        function for name, function in vars(importlib.import_module("test_confident")).items() if name[:5] == "test_"
    ]
    assert len(tests) == 2
    for test in tests:
        test()


@pytest.fixture
def common(package: Path, tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, Any]:
    """Options of a run under the objective of the package."""
    for part in (tiny_llama, tiny_tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    rows = [{"text": f"{n} stills boil"} for n in range(40)]
    return {"teacher": tmp_path / "teacher", "data": rows, "objective": "confident:threshold=0.1", "context": 32}


@pytest.mark.slow
def test_a_package_objective_is_trained_and_carded(common: dict[str, Any], tmp_path: Path) -> None:
    assert "confident" in list_objective_names()
    run = potstill.distill(
        **common, student=common["teacher"], tokens=64, batch_tokens=64, documents=2, out=tmp_path / "made"
    )
    objective = run.card.stage["objective"]
    assert (objective["name"], set(objective["options"])) == ("confident", {"threshold", "sha256"})
    assert "confident" in (tmp_path / "made" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_package_objective_is_planned_and_checked(common: dict[str, Any]) -> None:
    plan = potstill.plan(**common, student=common["teacher"], batch_tokens=64, measure=False)
    assert plan.stage.objective.options.threshold == 0.1
    report = potstill.doctor(**common)
    assert report.passed
    assert len(report.checks) > 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "entry point no_such_package:Nothing does not load: ModuleNotFoundError"),
        ("text", "confident:__name__ is no function or class"),
        ("confident:sharpness=2", "confident has no option 'sharpness'; it has threshold"),
    ],
)
def test_a_broken_package_objective_is_named(package: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ObjectiveConfig.parse(name, cross_entropy=0.5, temperature=1.0)
