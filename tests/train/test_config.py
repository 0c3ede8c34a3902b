"""Settings: how a budget of tokens becomes steps, and what is refused."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.errors import UsageError
from potstill.train.config import TrainConfig


@given(
    context=st.integers(1, 64),
    batch=st.integers(1, 2048),
    micro=st.integers(1, 2048),
    ranks=st.integers(1, 8),
    tokens=st.integers(1, 50_000),
)
def test_a_budget_is_met_within_half_a_step(context: int, batch: int, micro: int, ranks: int, tokens: int) -> None:
    settings = TrainConfig(context=context, batch_tokens=max(batch, context * ranks), micro_tokens=micro, tokens=tokens)
    step = settings.packs_per_step
    if step % ranks:
        with pytest.raises(UsageError, match=rf"{ranks} ranks; make --batch-tokens a multiple of {context * ranks}"):
            settings.accumulation_steps(ranks)
        return
    assert settings.packs_per_pass(ranks) * settings.accumulation_steps(ranks) * ranks == step
    assert settings.packs_per_pass(ranks) * context <= max(context, micro)
    assert settings.steps == 1 or abs(settings.steps * step * context - tokens) <= step * context / 2


def test_two_ranks_halve_the_passes_of_each() -> None:
    settings = TrainConfig(context=32, batch_tokens=256, micro_tokens=64, tokens=2560)
    assert [settings.accumulation_steps(ranks) for ranks in (1, 2, 4)] == [4, 2, 1]
    assert settings.steps == 10


def test_passes_that_do_not_divide_a_step_are_made_smaller() -> None:
    settings = TrainConfig(context=64, batch_tokens=256, micro_tokens=200)
    assert (settings.packs_per_pass(), settings.accumulation_steps()) == (2, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"epochs": 0.0},
        {"epochs": math.nan},
        {"tokens": 1, "epochs": 1.0},
        {"context": -1},
        {"batch_tokens": 511},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"warmup": 1.0},
        {"final_rate": 1.5},
        {"clip": -1.0},
        {"weight_decay": math.nan},
        {"eval_every": -2},
        {"save_every": -2},
        {"seed": -1},
        {"patience": 3},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        TrainConfig(**change)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (2.0, 6), (0.5, 2), (0.01, 1), (2.1, 7)])
def test_epochs_are_passes_over_the_packs_in_whole_steps(epochs: float, steps: int) -> None:
    settings = TrainConfig(context=32, batch_tokens=64, epochs=epochs).resolve_epochs(
        5
    )  # three steps: of 2, 2 and 1 packs
    assert (settings.steps, settings.tokens, settings.epochs) == (steps, steps * 64, None)
    assert settings.resolve_epochs(1000) == settings


@pytest.mark.parametrize(("epochs", "updates", "steps"), [(15.0, 1, 15), (1.0, 3, 3), (0.5, 4, 2), (0.01, 1, 1)])
def test_epochs_of_a_rollout_of_steps_leave_out_what_fills_no_step(epochs: float, updates: int, steps: int) -> None:
    settings = TrainConfig(context=32, batch_tokens=512 * 32, epochs=epochs).resolve_epochs(700, updates=updates)
    assert (settings.steps, settings.tokens) == (steps, steps * 512 * 32)
