"""The game of draft sizes and lengths: golden numbers of the theory, and what a table of speed-ups says."""

from typing import Any

import pytest

from potstill.evaluate.spec_game import Game, GameDraft, read_game


def draft(
    name: str = "draft", *, share: float | None = 0.1, alpha: float = 0.6, cost: float = 0.05, **speeds: float
) -> GameDraft:
    speed_ups = {int(length[1:]): float(value) for length, value in (speeds or {"g1": 1.0}).items()}
    return GameDraft(name=name, share=share, alpha=alpha, cost=cost, speed_ups=speed_ups)


@pytest.mark.parametrize(
    ("alpha", "cost", "length", "speed"),
    [(0.6, 0.05, 4, 1.921), (0.8, 0.05, 8, 3.092), (0.8, 0.2, 4, 1.868), (0.3, 0.4, 0, 1.0)],
)
def test_the_theory_has_its_golden_numbers(alpha: float, cost: float, length: int, speed: float) -> None:
    theory = draft(alpha=alpha, cost=cost).to_dict()["theory"]
    assert theory["best_length"] == length
    assert theory["best_speed_up"] == pytest.approx(speed, abs=5e-4)


def test_theory_has_an_interior_turning_point_in_length_and_in_size() -> None:
    sizes = [draft(alpha=alpha, cost=cost) for alpha, cost in ((0.3, 0.01), (0.7, 0.05), (0.85, 0.4))]
    best = [each.to_dict()["theory"]["best_speed_up"] for each in sizes]
    assert best[0] < best[1] > best[2]
    lengths = draft(alpha=0.7, cost=0.1, g1=1, g3=1, g8=1).to_dict()["theory"]["by_length"]
    assert lengths[1] < lengths[3] > lengths[8]


def test_a_turning_point_lies_inside_of_what_was_tried() -> None:
    small, middle, large = (
        draft("small", share=0.1, g1=1.1, g2=1.0),
        draft("middle", share=0.3, g1=1.1, g2=1.4, g3=1.2),
        draft("large", share=0.8, g1=0.9, g2=0.8),
    )
    game = Game([small, middle, large])
    assert (game.best, game.best.best_length) == (middle, 2)
    assert (game.has_length_turn, game.has_size_turn) == (True, True)
    assert "The best draft is middle, which has 30% of the target's parameters, with 2 tokens per draft: 1.40" in (
        game.describe()
    )
    assert not Game([small, draft("longer", share=0.05, g1=1.2, g2=1.3)]).has_length_turn
    assert not Game([small, large]).has_size_turn
    assert not Game([draft("lookup", share=None, g1=3.0), large]).has_size_turn


def test_a_game_is_read_from_an_advice_measured_before_predicted() -> None:
    row = {"draft": "exit:2", "tree": None, "predicted": 0.9, "measured": None}
    rows: list[dict[str, Any]] = [
        {**row, "draft_length": 1},
        {**row, "draft_length": 2, "measured": 0.8},
        {**row, "draft": "lookup", "draft_length": 1},
    ]
    entry = {"draft": "exit:2", "parameter_share": 0.25, "acceptance": [0.8, 0.5], "cost": {"1": 0.3, "2": 0.5}}
    (exit_draft,) = read_game({"drafts": [entry], "settings": rows}).drafts
    assert (exit_draft.name, exit_draft.share, exit_draft.cost, exit_draft.speed_ups) == (
        "exit:2",
        0.25,
        0.25,
        {1: 0.9, 2: 0.8},
    )
    assert exit_draft.alpha == pytest.approx(120 / 180)
    assert exit_draft.to_dict()["operations"] == pytest.approx((1 * 0.25 + 2) / (1 + 120 / 180))
