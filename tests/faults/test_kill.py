"""A run that is killed and resumed ends as one that was let be (see kill.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def killed(*options: str) -> str:
    """What the script says, in a process of its own: it forks, which a process with threads must not."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "tests.faults.kill", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_capture_that_was_killed_and_resumed_is_bit_by_bit_an_unbroken_one() -> None:
    assert "cache: 2 of 2 identical" in killed("--job", "cache", "--times", "2")


@pytest.mark.slow
def test_a_training_that_was_killed_and_resumed_is_bit_by_bit_an_unbroken_one() -> None:
    assert "distill: 2 of 2 identical" in killed("--job", "distill", "--times", "2", "--seed", "2")


@pytest.mark.slow
def test_twenty_kills_of_either_change_nothing() -> None:
    said = killed("--times", "20", "--seed", "3")
    assert "distill: 20 of 20 identical" in said
    assert "cache: 20 of 20 identical" in said
