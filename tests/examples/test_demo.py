"""The demo runs from end to end on a tiny teacher."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tests.stages.world import teacher, text

__all__ = ["teacher", "text"]

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_the_demo_makes_three_students_their_measures_and_a_chart_and_resumes(
    tmp_path: Path, teacher: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    arguments = ["--out", str(out), "--teacher", str(teacher), "--data", str(text), "--tokens", "300"]
    arguments += ["--documents", "4", "--keep", "0.755", "--strategy", "depth"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    runpy.run_path(str(DEMO), run_name="__main__")
    measures = json.loads((out / "measures.json").read_text())
    assert list(measures["models"]) == ["teacher", "pruned", "cross-entropy", "distilled"]
    assert "<svg" in (out / "frontier.html").read_text()
    weights = (out / "distilled" / "model.safetensors").stat().st_mtime_ns

    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments, "--resume"])
    runpy.run_path(str(DEMO), run_name="__main__")
    assert (out / "distilled" / "model.safetensors").stat().st_mtime_ns == weights
    assert "of the pruning's damage repaired" in capsys.readouterr().out
