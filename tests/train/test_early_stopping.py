"""When a run is stopped, from its log alone."""

import pytest

from potstill.train.early_stopping import find_best_step, find_loss_explosion, is_patience_exhausted


def steps(*losses: float) -> list[dict[str, float]]:
    return [{"loss": loss} for loss in losses]


def evaluations(*losses: float) -> list[dict[str, float]]:
    return [{"loss": 1.0}, *({"eval_loss": loss, "step": step} for step, loss in enumerate(losses, 1))]


def test_a_loss_three_nats_above_the_median_has_exploded() -> None:
    assert find_loss_explosion(steps(*[2.0] * 20, 5.1)) == 2.0
    assert find_loss_explosion(steps(*[2.0] * 20, 4.9)) is None


def test_a_large_loss_may_rise_by_half_of_it() -> None:
    assert find_loss_explosion(steps(*[8.0] * 20, 11.9)) is None
    assert find_loss_explosion(steps(*[8.0] * 20, 12.1)) == 8.0


def test_fewer_than_twenty_steps_say_nothing() -> None:
    assert find_loss_explosion(steps(*[2.0] * 19, 100.0)) is None


def test_only_the_last_twenty_steps_are_compared_with() -> None:
    assert find_loss_explosion(steps(50.0, *[40.0] * 30, *[2.0] * 20, 51.0)) == 2.0


def test_a_loss_that_is_not_above_the_first_has_not_exploded() -> None:
    assert find_loss_explosion(steps(12.0, *[2.0] * 20, 11.0)) is None


def test_a_loss_near_zero_may_jump_by_nats() -> None:
    assert find_loss_explosion(steps(*[0.01] * 20, 2.9)) is None
    assert find_loss_explosion(steps(*[0.01] * 20, 3.1)) == 0.01


def test_evaluations_between_steps_do_not_count_as_steps() -> None:
    assert (
        find_loss_explosion([*steps(*[2.0] * 10), {"eval_loss": 9.0}, *steps(*[2.0] * 10, 11.0), {"eval_loss": 1.0}])
        == 2
    )


@pytest.mark.parametrize(
    ("losses", "patience", "ended"),
    [
        ((3.0, 2.0, 2.1, 2.2), 2, True),
        ((3.0, 2.0, 2.1), 2, False),
        ((3.0, 2.0, 2.0), 1, True),  # as good is no better
        ((3.0, 3.1, 2.9, 3.0), 2, False),
        ((1.0, 2.0, 3.0), 0, False),
        ((1.0,), 1, False),
    ],
)
def test_patience_ends_after_so_many_evaluations_without_a_better_one(
    losses: tuple[float, ...], patience: int, ended: bool
) -> None:
    assert is_patience_exhausted(evaluations(*losses), patience) is ended


def test_the_best_evaluation_is_the_first_of_the_lowest() -> None:
    assert find_best_step(evaluations(3.0, 2.0, 2.5, 2.0)) == 2
    assert find_best_step(steps(1.0, 2.0)) is None
