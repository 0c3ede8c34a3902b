"""Phases on stderr: plain lines off a terminal, one line that goes away on a terminal, nothing without a screen."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from potstill.core import screen
from potstill.core.screen import Verbosity, get_verbosity, open_screen, set_verbosity, status, track


class InstantTimer:
    """A timer that is over as soon as it starts."""

    def __init__(self, seconds: float, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments

    def start(self) -> None:
        self.function(*self.arguments)

    def cancel(self) -> None:
        return


@pytest.fixture(autouse=True)
def same_verbosity() -> Iterator[None]:
    before = get_verbosity()
    yield
    set_verbosity(before)


def work() -> None:
    with status("reading teacher"):
        assert list(track([1, 2, 3], "ranking layers")) == [1, 2, 3]


@pytest.mark.parametrize(
    ("verbosity", "lines"),
    [
        (Verbosity.QUIET, []),
        (Verbosity.NORMAL, ["reading teacher", "ranking layers (3)"]),
        (
            Verbosity.VERBOSE,
            ["reading teacher", "ranking layers (3)", "ranking layers 3/3 took", "reading teacher took"],
        ),
    ],
)
def test_off_a_terminal_a_phase_is_a_plain_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verbosity: Verbosity, lines: list[str]
) -> None:
    monkeypatch.setattr(screen.threading, "Timer", InstantTimer)
    set_verbosity(verbosity)
    work()
    assert capsys.readouterr().err == ""
    with open_screen():
        work()
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == len(lines)
    assert all(line.startswith(start) for line, start in zip(shown, lines, strict=True))


def test_a_long_phase_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen.threading, "Timer", InstantTimer)
    monkeypatch.setattr(screen, "LONGEST_SILENCE", -1.0)
    with open_screen():
        list(track("ab", "packing"))
    assert capsys.readouterr().err.splitlines() == ["packing (2)", "packing 1/2", "packing 2/2"]


def test_a_phase_that_is_over_at_once_gets_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with open_screen():
        work()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_line_changes_and_goes_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with open_screen():
        work()
    shown = capsys.readouterr().err
    assert "reading teacher" in shown
    assert "\x1b[?25h" in shown  # the cursor is back
