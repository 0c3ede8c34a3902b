"""The progress of training: a line of a terminal that never overflows, and plain lines of a file."""

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from potstill.core.screen import Verbosity, set_verbosity
from potstill.train import callbacks
from potstill.train.callbacks import ProgressLineCallback
from potstill.train.progress import TrainingProgress, format_duration, select_terms

TERMS = {"loss": 2.3456, "forward_kl": 1.2345, "cross_entropy": 3.4567, "attention_relations": 0.1234}
PROGRESS = TrainingProgress(7, 1200, seconds_left=754.0, tokens_per_second=1234.5, terms=TERMS)


@pytest.mark.parametrize(
    ("width", "text"),
    [
        pytest.param(20, "    7/1,200  ETA   12:34    1,234 tok/s", id="too narrow: the head alone"),
        pytest.param(52, "    7/1,200  ETA   12:34    1,234 tok/s  loss 2.346", id="80 columns"),
        pytest.param(
            92,
            "    7/1,200  ETA   12:34    1,234 tok/s  loss 2.346  forward_kl 1.234  cross_entropy 3.457",
            id="120 columns",
        ),
    ],
)
def test_the_terms_that_fit_come_after_a_head_of_fixed_width(width: int, text: str) -> None:
    assert PROGRESS.make_terminal_text(width) == text
    later = TrainingProgress(1200, 1200, seconds_left=0.0, tokens_per_second=98765.0)
    assert len(later.head) == len(TrainingProgress(0, 1200).head) == len(PROGRESS.head)


def test_a_plain_line_holds_every_term() -> None:
    line = "step     7/1,200  ETA   12:34    1,234 tok/s  loss 2.3456  forward_kl 1.2345  cross_entropy 3.4567"
    assert PROGRESS.make_line() == f"{line}  attention_relations 0.1234"
    first = TrainingProgress(0, 9, terms={"eval_kl": 1.0})
    assert first.make_line().endswith("ETA    -:--        - tok/s  held-out kl 1.0000")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (7.0, "0:07"), (59.6, "1:00"), (754.0, "12:34"), (3723.0, "1:02:03"), (450_000.0, "5d 05h")],
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_bookkeeping_is_no_term_and_the_loss_is_the_first() -> None:
    logs = {"forward_kl": 1.0, "loss": 2.0, "grad_norm": 3.0, "learning_rate": 0.1, "epoch": 1.0, "eval_runtime": 4.0}
    assert list(select_terms(logs)) == ["loss", "forward_kl"]


def shown_lines(
    capsys: pytest.CaptureFixture[str], folder: Path, console: Console, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[str]:
    """What a run of 100 steps with an evaluation shows."""
    monkeypatch.setattr(callbacks, "Console", lambda stderr: console)
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    state, control = TrainerState(global_step=0, max_steps=100, num_input_tokens_seen=0), TrainerControl()
    line = ProgressLineCallback("student", **options)
    line.on_train_begin(args, state, control)
    for step in range(1, 101):
        state.global_step, state.num_input_tokens_seen = step, 64 * step
        line.on_log(args, state, control, logs={"loss": 2.5, "forward_kl": 1.25, "grad_norm": 1.0})
        if step == 50:
            line.on_log(args, state, control, logs={"eval_loss": 2.25, "eval_runtime": 1.0})
    line.on_log(args, state, control, logs={"train_loss": 2.5, "train_runtime": 9.0})
    line.on_train_end(args, state, control)
    return re.sub(r"ETA +\S+ +[\d,]+ tok/s", "ETA", capsys.readouterr().err).splitlines()


def test_a_file_gets_about_twenty_plain_lines_and_one_for_an_evaluation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown_lines(capsys, tmp_path, Console(stderr=True, force_terminal=False), monkeypatch)
    assert lines[:3] == [
        "training student, 100 steps",
        "step   1/100  ETA  loss 2.5000  forward_kl 1.2500",
        "step   5/100  ETA  loss 2.5000  forward_kl 1.2500",
    ]
    evaluation = [line for line in lines if line.startswith("step  50")][1]
    assert evaluation.endswith("forward_kl 1.2500  held-out loss 2.2500")
    assert len(lines) == 1 + 21 + 1
    assert lines[-1].startswith("step 100/100")


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_one_line_that_is_never_cut(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    console = Console(stderr=True, force_terminal=True, width=width, color_system=None)
    shown = "\n".join(shown_lines(capsys, tmp_path, console, monkeypatch))
    assert "step" not in shown
    assert "…" not in shown
    assert ("forward_kl 1.250" in shown) == (width == 120)


def test_a_quiet_run_shows_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.core.screen._Settings.verbosity", Verbosity.QUIET)
    assert shown_lines(capsys, tmp_path, Console(stderr=True, force_terminal=False), monkeypatch) == []
    set_verbosity(Verbosity.NORMAL)
