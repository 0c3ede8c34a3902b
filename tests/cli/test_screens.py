"""What a person sees: golden texts of the screens at 80 and 120 columns, on and off a terminal.

`POTSTILL_RENEW=1 pytest tests/cli/test_screens.py` writes the golden texts again; read them before you commit them.
"""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.cli.conftest import Call

from potstill.cli import tables
from potstill.cli.commands.arena import print_arena_report
from potstill.cli.commands.plan import print_plan
from potstill.cli.dry_run import print_facts
from potstill.cli.layout import build_tables
from potstill.core.measure_table import MEASURES
from potstill.core.suggestions import suggest, suggest_path

GOLDEN = Path(__file__).parent / "screens"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
MODELS = {"teacher": (0.881, 134_515_008, 31.0), "before training": (2.934, 100_919_232, 41.0), "out": (0.914, 1e8, 40)}


def measures(bits: float, parameters: float, speed: float) -> list[dict[str, Any]]:
    values = {"bits_per_byte": bits, "teacher_kl": bits / 4, "teacher_agreement": 1 - bits / 8, "rouge_l": 20 * bits}
    qualities = [
        MEASURES[name].build(value, 100, low=0.97 * value, high=1.03 * value) for name, value in values.items()
    ]
    costs = {"parameters": parameters, "bfloat16_bytes": 2 * parameters, "prefill_tokens_per_second": 40 * speed}
    costs["decode_tokens_per_second"] = speed
    return [m.to_dict() for m in (*qualities, *(MEASURES[name].build(float(v), 1) for name, v in costs.items()))]


def difference(a: str, b: str, value: float) -> dict[str, Any]:
    bounds = {"low": value - 0.05, "high": value + 0.05}
    seeds = [{"value": value + shift} for shift in (-0.01, 0.0, 0.01)]
    verdict = {"verdict": "not told apart", "why": "documents differ by as much"}
    return {"name": "bits_per_byte", "a": a, "b": b, "value": value, **bounds, "seeds": seeds, **verdict}


def print_measures() -> None:
    tables.print_measures(
        {name: measures(*values) for name, values in MODELS.items()}, [difference("teacher", "out", -0.4)]
    )


def print_checks() -> None:
    why = "a student that equals its teacher has nothing to learn, so another loss is a wrong loss"
    checks = [
        {"name": "zero loss for a copy", "outcome": "pass", "found": "0.0 nats on 2 windows", "why": why},
        {"name": "stop token", "outcome": "fail", "found": "no chat ends with <|im_end|>", "why": why},
    ]
    tables.print_checks([checks[0], {**checks[1], "remedy": "correct the chat template"}])


def print_arena() -> None:
    arms = [
        {"arm": name, "means": {k: {"value": v, "low": 0.99 * v, "high": 1.01 * v} for k, v in values.items()}}
        for name, values in {
            "cross_entropy": {"bits_per_byte": 0.931, "teacher_kl": 0.215, "tokens": 200_704.0, "peak_memory": 2e9},
            "0.5*forward_kl+0.5*hidden_states": {"bits_per_byte": 0.911, "teacher_kl": 0.115, "tokens": 200_704.0},
        }.items()
    ]
    pairs = [difference("0.5*forward_kl+0.5*hidden_states", "cross_entropy", -0.02)]
    baselines = {"teacher": {"bits_per_byte": 0.88}, "before training": {"bits_per_byte": 2.93, "teacher_kl": 1.9}}
    print_arena_report({"arms": arms, "baselines": baselines, "paired": pairs}, "arena")


def print_budget() -> None:
    sizes = {"blocks": 106_203_648, "embeddings": 28_311_552, "total": 134_515_200}
    report = {
        "stage": {"teacher": "smollm2", "settings": {"tokens": 200_000, "learning_rate": 5e-4}},
        "parameters": {"teacher": sizes, "student": sizes, "objective": 0},
        "flops_per_token": {"student forward": 2e8, "teacher forward": 3e8},
        "state_bytes": {name: {"context": 47_185_920, "token": 23_040} for name in ("teacher", "student")},
        "time": {"steps": 98, "seconds_per_step": 2.5, "seconds": 245.0, "tokens_per_second": 819.2}
        | {"parts": {"student forward": 0.7, "student backward": 1.2, "teacher forward": 0.6}},
        "memory": {"weights": 9e8, "gradients": 4e8, "optimizer": 8e8, "peak": 2.1e9},
        "phases": {"training": 3e9, "measuring": 2e9},
        "disk": {"most": 3e9, "final": 4e8},
        "room": {"memory": 8e9, "disk": 1e11},
        "fits": {"memory": False, "disk": True},
        "capacity_gap": {"teacher_for_student": 3e8, "student_for_teacher": 5e7, "range": "measured from 100M to 7B"},
        "alignment": None,
        "notes": [],
        "suggestions": [
            {"change": "--checkpoint-activations", "memory": 1e9, "disk": 3e9, "seconds": 300.0, "fits": True},
            {"change": "--batch-tokens 1024 --micro-tokens 1024", "memory": 2e9, "disk": 3e9, "seconds": 1, "fits": 0},
        ],
    }
    print_plan(report)


def print_dry_run() -> None:
    print_facts(
        {
            "stage": {"teacher": "smollm2"},
            "out": "student",
            "teacher": ["/home/someone/.cache/potstill/smollm2.gguf"],
            "student": {
                "model": None,
                "layers": 20,
                "kv_heads": 3,
                "ffn": 1536,
                "hidden": 576,
                "parameters": 99_114_048,
            },
            "objective": "0.7 * cross_entropy + 0.3 * forward_kl",
            "data": {"name": "pairs.jsonl", "kind": "pairs", "columns": ["prompt", "response"], "tokens": 81_920},
            "training": {"tokens": 163_840, "steps": 80, "passes": 2.0},
            "memory": {"peak": 3e9, "free": None},
            "disk": {"checkpoint": 1.2e9, "final": 2e8, "most": 2.6e9, "free": 9e10},
        }
    )


def print_models() -> None:
    folder = "/home/someone/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/12fd25f7"
    tables.print_models(
        [
            {"name": "smollm2", "bytes": 144_811_360, "licence": "apache-2.0", "path": f"{folder}/model.gguf"},
            {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "bytes": 0, "licence": None, "path": folder},
        ]
    )


def print_advice() -> None:
    drafts = [
        {"draft": "lookup", "tree": None, "acceptance": [0.07, 0.75, 0.75, 0.5], "cost": dict.fromkeys("124", 0.01)},
        {"draft": "exit:8", "tree": None, "acceptance": [0.31, 0.2], "cost": {"1": 0.41, "2": 0.87, "4": 1.9}},
        {"draft": "exit:8", "tree": "4,2", "acceptance": [0.4, 0.3], "cost": {"2": 0.92}},
    ]
    shapes = [("lookup", 1, None), ("lookup", 4, None), ("exit:8", 2, None), ("exit:8", None, "4,2")]
    settings = [
        {"draft": draft, "draft_length": length, "tree": tree, "tokens_per_pass": 1.1 + n / 20, "flags": ""}
        | {"draft_cost": 0.01 + n / 3, "verify_cost": 1.05}
        | {"predicted": 1.08 - n / 4, "measured": 1.07 - n / 4, "error": 0.01 * n}
        for n, (draft, length, tree) in enumerate(shapes)
    ]
    sentence = "Speculate with --draft lookup --draft-length 1, which decodes 1.07 times as fast as without drafts."
    tables.print_advice(
        {
            "verification_cost": {"1": 1.04, "2": 1.08, "4": 1.4},
            "drafts": drafts,
            "settings": settings,
            "differences": [{"flags": "--draft lookup --draft-length 4", "prompt": 2, "token": 40}],
            "data": {"prompts": 8},
            "conditions": {"device": "cpu", "threads": 2, "dtype": "bfloat16"},
            "advice": {"sentence": sentence},
        }
    )


SCREENS: Mapping[str, Callable[[], None]] = {
    "measures": print_measures,
    "checks": print_checks,
    "arena": print_arena,
    "plan": print_budget,
    "dry-run": print_dry_run,
    "models": print_models,
    "advice": print_advice,
}


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_is_the_golden_one_and_cuts_no_line(
    monkeypatch: pytest.MonkeyPatch, name: str, width: int, is_terminal: bool
) -> None:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=is_terminal, color_system="standard" if is_terminal else None
    )
    monkeypatch.setattr(tables, "console", console)
    SCREENS[name]()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("\x1b[" in shown) == is_terminal
    text = "".join(f"{line.rstrip()}\n" for line in ESCAPES.sub("", shown).splitlines())
    assert "…" not in text
    golden = GOLDEN / f"{name}-{width}.txt"
    if os.environ.get("POTSTILL_RENEW"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_name_or_number_is_cut_at_any_width(width: int) -> None:
    headers = ["model", *(info.column for info in MEASURES.values())]
    row = ["a-model-of-27-characters/it", *(f"{n}.123 [{n}.001, {n}.456]" for n in range(len(MEASURES)))]
    console = Console(file=io.StringIO(), width=width)
    for table in build_tables(headers, [row, row], width=width):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= width
    lost = [n for n in range(len(MEASURES)) if f"{n}.123" not in shown or f"[{n}.001, {n}.456]" not in shown]
    assert not lost
    assert width == 40 or row[0] in shown


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        pytest.param(("prun",), "Did you mean 'prune'", id="a command"),
        pytest.param(("distill", "--techer", "x"), "did you mean '--teacher'?", id="an option"),
        pytest.param(("recipes", "minma"), "did you mean 'minima'?", id="a recipe"),
        pytest.param(
            ("distill", "--teacher", "x", "--keep", "0.5", "--out", "o", "--objective", "forwrd_kl"),
            "did you mean 'forward_kl'?",
            id="an objective",
        ),
        pytest.param(
            ("distill", "--teacher", "x", "--keep", "0.5", "--out", "o", "--objective", "jsd:bta=0.3"),
            "did you mean 'beta'?",
            id="an option of an objective",
        ),
        pytest.param(
            ("prune", "smollm2", "--keep", "0.5", "--out", "o", "--strategy", "dpth"),
            "did you mean 'depth'?",
            id="a choice",
        ),
    ],
)
def test_a_misspelled_name_gets_the_one_that_is_probably_meant(
    potstill: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: tuple[str, ...], hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = potstill(*call)
    assert answer.code == 2
    assert hint in answer.err


def test_rows_that_are_left_out_are_shown_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_dataset("mixed", {"prompts": 8, "right_pairs": 3, "left_out": {"never right": 15}})
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows[2:6] == ["folder mixed", "prompts 8", "right pairs 3", "left out: never right 15"]


def test_a_misspelled_model_or_path_gets_its_neighbor(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    assert suggest_path(tmp_path / "studnet") == f" (did you mean {str(tmp_path / 'student')!r}?)"
    assert suggest_path(Path("smolm2"), ("smollm2",)) == " (did you mean 'smollm2'?)"
    assert suggest("xyz", ["forward_kl"]) == ""


@pytest.mark.parametrize(
    ("words", "position", "expected"), [("potstill dist", 1, "distill"), ("potstill distill --tea", 2, "--teacher")]
)
def test_a_shell_completes_commands_and_options(words: str, position: int, expected: str) -> None:
    request = {"_POTSTILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    call = [sys.executable, "-m", "potstill"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, env={**os.environ, **request})
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout.split()
