"""The verbs as Python functions: the command line's names and defaults, and errors that say what there is."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer.main

import potstill
from potstill.cli.app import app
from potstill.core.errors import UsageError
from potstill.stages.distill.config import DistillConfig

GROUP: Any = typer.main.get_command(app)


def test_what_python_and_the_command_line_share_is_named_and_set_alike() -> None:
    shown = {option.name: option.default for option in GROUP.commands["distill"].params}
    ours = inspect.signature(potstill.distill).parameters
    assert set(shown) - set(ours) == {"config", "dry_run", "as_json", "help"} & set(shown)
    assert set(ours) - set(shown) == {"clip", "final_rate"}
    shared = {name for name in set(ours) & set(shown) if ours[name].default is not inspect.Parameter.empty}
    written_otherwise = {"tokens", "report_to"}
    assert {name: ours[name].default for name in shared - written_otherwise} == {
        name: shown[name] for name in shared - written_otherwise
    }


def test_keywords_become_the_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stages: list[DistillConfig] = []

    def keep(stage: DistillConfig, out: Path, **_: Any) -> None:
        stages.append(stage)
        raise InterruptedError

    monkeypatch.setattr("potstill.api.run_distill", keep)
    with pytest.raises(InterruptedError):
        potstill.distill(teacher="t", keep=0.5, lr=1e-4, context=64, seed=7, lora=4, tokens=9, clip=2.0, out=tmp_path)
    (stage,) = stages
    assert (stage.teacher, stage.keep, stage.lora) == ("t", 0.5, 4)
    settings = stage.settings
    assert (settings.learning_rate, settings.context, settings.seed, settings.tokens) == (1e-4, 64, 7, 9)
    assert settings.clip == 2.0


def test_an_unknown_keyword_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no option 'learning'; it has .*batch_tokens.*lora.*lr"):
        potstill.distill(teacher="t", keep=0.5, learning=1, out=tmp_path)
