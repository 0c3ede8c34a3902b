"""`potstill arena`: what its options mean, and what it prints."""

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Call

from potstill.cli.commands.arena import parse_budget, parse_seeds
from potstill.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("200k", {"tokens": 200_000}),
        ("10M", {"tokens": 10_000_000}),
        ("512", {"tokens": 512}),
        ("10m", {"seconds": 600.0}),
        ("90s", {"seconds": 90.0}),
        ("1.5h", {"seconds": 5400.0}),
        ("2 min", {"seconds": 120.0}),
        ("1epoch", {"epochs": 1.0}),
        ("2.5 epochs", {"epochs": 2.5}),
    ],
)
def test_a_small_m_is_minutes_and_a_large_one_millions_of_tokens(text: str, budget: dict[str, float]) -> None:
    assert parse_budget(text) == budget


def test_seeds_are_counted_from_the_first_or_named() -> None:
    assert parse_seeds("3", 1) == (1, 2, 3)
    assert parse_seeds("1", 7) == (7,)
    assert parse_seeds("5, 9", 1) == (5, 9)


def test_what_is_neither_budget_nor_seeds() -> None:
    with pytest.raises(UsageError, match=r"'ten'.*10m for ten minutes"):
        parse_budget("ten")
    with pytest.raises(UsageError, match="'a,b'"):
        parse_seeds("a,b", 1)


@pytest.mark.slow
def test_arena_prints_a_table_a_document_or_a_plan(potstill: Call, teacher: Path, text: Path, tmp_path: Path) -> None:
    call = ("arena", "--teacher", teacher, "--student", teacher, "--data", text, "--context", 64, "--dtype", "float32")
    call += ("--batch-tokens", 128, "--budget", 256, "--seeds", 1, "--documents", 3, "--skip-doctor")
    made = tmp_path / "made"
    planned = potstill(*call, "--out", made, "--dry-run")
    assert planned.code == 0, planned.err
    assert "forward_kl" in planned.out
    assert not made.exists()
    answer = potstill(*call, "--out", made)
    assert answer.code == 0, answer.err
    for word in ("bits per byte", "before training", "forward_kl against", "better or worse", "peak MiB", "arena.json"):
        assert word in answer.out
    assert "arm 2 of 2: forward_kl, seed 1, 256 tokens" in answer.err
    again = potstill(*call, "--out", made, "--resume", "--json")
    assert [arm["arm"] for arm in json.loads(again.out)["arms"]] == ["cross_entropy", "forward_kl"]


def test_arena_refuses_before_it_trains(potstill: Call, teacher: Path, text: Path, tmp_path: Path) -> None:
    call = ("arena", "--teacher", teacher, "--data", text, "--out", tmp_path / "made")
    for more, word in (
        (("--student", teacher, "--objectives", "cross_entropy,nonsense"), "nonsense"),
        (("--objectives", "forward_kl"), "--keep"),
        (("--student", teacher, "--budget", "soon"), "soon"),
        (("--student", teacher, "--seeds", "0"), "at least one"),
    ):
        answer = potstill(*call, *more)
        assert (answer.code, answer.out) == (2, "")
        assert word in answer.err
    assert not (tmp_path / "made").exists()
