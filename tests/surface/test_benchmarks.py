"""Every benchmark says how it is run, rests on tests that exist, reports as the others do, and is on the page."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def name(path: Path) -> str:
    return path.name


def assigned(tree: ast.Module, variable: str) -> list[str]:
    """The strings of the list that a module assigns to `variable`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable:
            found: list[str] = ast.literal_eval(node.value)
            return found
    return []


def test_there_are_benchmarks() -> None:
    assert SCRIPTS


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_it_says_how_it_is_run(path: Path) -> None:
    says = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"python benchmarks/{path.name} --json" in says


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_it_rests_on_tests_that_exist(path: Path) -> None:
    tests = assigned(ast.parse(path.read_text(encoding="utf-8")), "RESTS_ON")
    assert tests
    assert not [test for test in tests if not (ROOT / test).exists()]


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_it_refuses_and_reports_as_the_others_do(path: Path) -> None:
    called = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)}
    assert {"command_line", "refuse_on_red", "document"} <= called


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_the_page_has_a_line_for_it(path: Path) -> None:
    assert f"| `{path.name}` |" in PAGE
