"""The notebook of the tutorials runs from end to end on a tiny teacher, and is stored without output."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from tests.stages.world import teacher, text

from potstill.core.options import list_options
from potstill.stages.options import DistillOptions

__all__ = ["teacher", "text"]

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorials" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_has_no_output() -> None:
    assert not [cell for cell in CODE if cell["outputs"] or cell["execution_count"]]


def test_the_notebook_compiles_and_sets_options_that_exist() -> None:
    known = {option.name for option in list_options(DistillOptions)} | {"out"}
    nodes = [node for cell in CODE for node in ast.walk(ast.parse("".join(cell["source"])))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "potstill.distill"]
    assert calls
    assert {keyword.arg for call in calls for keyword in call.keywords} <= known


@pytest.mark.slow
def test_the_notebook_runs_on_a_tiny_teacher(
    tmp_path: Path, teacher: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"teacher": str(teacher), "data": str(text), "keep": 0.755, "tokens": 512, "documents": 2}
    values["out"] = str(tmp_path / "student")
    (parameters,) = [cell for cell in CODE if "parameters" in cell["metadata"].get("tags", ())]
    assert CODE[0] is parameters
    namespace: dict[str, Any] = {}
    exec("".join(parameters["source"]), namespace)
    assert set(values) == set(namespace) - {"__builtins__"}  # a new parameter needs a value here
    namespace |= values
    for number, cell in enumerate(CODE[1:], start=1):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number}", "exec"), namespace)
    assert {"teacher", "before training", "student"} == set(namespace["run"].measures)
    assert "bits_per_byte" in capsys.readouterr().out
    assert namespace["steps"]
