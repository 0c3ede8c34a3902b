"""The command line in this very process, on the small world of whole runs."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
from tests.stages.world import pairs, short_samples, teacher, text

from potstill.cli.app import main

__all__ = ["pairs", "short_samples", "teacher", "text"]

KEEP = 0.755  # of the tiny teacher: two layers of three
TINY = ("--tokens", "512", "--context", "64", "--batch-tokens", "256", "--dtype", "float32")


class Answer(NamedTuple):
    """What a call left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def potstill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`potstill ARGUMENTS...`, as a shell would call it."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["potstill", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        return Answer(int(left.value.code or 0), *capsys.readouterr())

    return call
