"""The demo runs from end to end on a tiny teacher."""

import json
import runpy
import sys
from argparse import Namespace
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
    assert ("cross-entropy", "distilled") in [(entry["a"], entry["b"]) for entry in measures["paired"]]
    assert "of the pruning's damage repaired" in capsys.readouterr().out
    weights = (out / "distilled" / "model.safetensors").stat().st_mtime_ns

    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments, "--resume"])
    runpy.run_path(str(DEMO), run_name="__main__")
    assert (out / "distilled" / "model.safetensors").stat().st_mtime_ns == weights
    assert "of the pruning's damage repaired" in capsys.readouterr().out


def test_the_demo_trains_both_students_of_every_seed_from_one_pruned_model(tmp_path: Path) -> None:
    demo = runpy.run_path(str(DEMO))
    options = Namespace(
        teacher="smollm2",
        data="docstrings",
        keep=0.75,
        strategy="auto",
        tokens=300,
        documents=4,
        batch_tokens=1024,
        seeds=[1, 3],
    )
    stages = demo["build_stages"](options, tmp_path)
    assert list(stages) == ["pruned", "cross-entropy-1", "distilled-1", "cross-entropy-3", "distilled-3"]
    trainings = [stage for name, stage in stages.items() if name != "pruned"]
    assert {stage.student for stage in trainings} == {str(tmp_path / "pruned")}
    assert [stage.settings.seed for stage in trainings] == [1, 1, 3, 3]
    assert [stage.objective.uses_teacher for stage in trainings] == [False, True, False, True]
