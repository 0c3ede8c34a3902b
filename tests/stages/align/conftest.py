"""A model in a folder, and preferences that it can learn in a few steps."""

from pathlib import Path

import pytest
from tests.stages.world import written

from potstill.stages.align.config import AlignConfig
from potstill.stages.align.options import AlignTrainConfig

SETTINGS = AlignTrainConfig(tokens=1024, context=128, batch_tokens=256, micro_tokens=128, save_every=2)


def make_row(number: int) -> dict[str, str]:
    """A question with a short and a long answer; the short one is chosen."""
    return {
        "prompt": f"Is {number} odd?",
        "chosen": "Yes." if number % 2 else "No.",
        "rejected": f"{number} is odd?",
    }


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    """Sixty pairs to train on."""
    return written(tmp_path / "preferences.jsonl", [make_row(number) for number in range(60)])


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Twelve pairs of other prompts."""
    return written(tmp_path / "held_out.jsonl", [make_row(number) for number in range(60, 72)])


@pytest.fixture
def config(teacher: Path, preferences: Path, held_out: Path) -> AlignConfig:
    """A few steps of DPO in float32."""
    return AlignConfig(
        model=str(teacher),
        data=str(preferences),
        eval_data=str(held_out),
        settings=SETTINGS,
        dtype="float32",
        save_dtype="float32",
    )
