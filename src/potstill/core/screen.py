"""What a person sees on stderr while a command works: its phases, how far each is, and notes.

Any part of potstill may report a phase. Nothing is shown unless a command has opened a screen::

    with status("ranking layers", total=30) as advance:
        for layer in layers:
            ...
            advance()

On a terminal a phase is one line that changes and goes away. Elsewhere it is a plain line if it takes more than a
second, once for each title, and another one for every minute.
"""

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.live import Live
    from rich.spinner import Spinner

Item = TypeVar("Item")

SHORT_PHASE = 1.0  # seconds; a phase that is over sooner gets no plain line
LONGEST_SILENCE = 60.0  # seconds without a line, off a terminal
SCREEN_FLAGS = ("--verbose", "--quiet", "--debug")  # of every command; they change no result
REFRESH_RATE = 4  # a second; more would take time from the work


class Verbosity(IntEnum):
    """How much is shown: warnings and errors; phases and notes too; the libraries' messages and times too."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


class Phase:
    """A phase that is under way: its title, how many steps are done, and of how many."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.done = title, total, 0
        self.start = self.last_line = time.monotonic()
        self.timer: threading.Timer | None = None  # writes the plain line of a phase that is not over at once

    def __str__(self) -> str:
        return self.title if self.total is None else f"{self.title} {self.done:,}/{self.total:,}"


class Screen:
    """Shows the phases of a job on stderr."""

    def __init__(self, *, is_terminal: bool, verbosity: Verbosity = Verbosity.NORMAL) -> None:
        self.is_terminal, self.verbosity = is_terminal, verbosity
        self.phases: list[Phase] = []
        self.titles: set[str] = set()  # of the plain lines
        self.live: Live | None = None
        self.spinner: Spinner | None = None

    def begin(self, phase: Phase) -> None:
        """Show a phase, inside those that are under way."""
        self.phases.append(phase)
        if self.is_terminal:
            self._refresh()
        elif phase.title not in self.titles:
            phase.timer = threading.Timer(SHORT_PHASE, self._announce, (phase,))
            phase.timer.daemon = True
            phase.timer.start()

    def advance(self, phase: Phase, done: int | None = None) -> None:
        """Show that `done` steps of a phase are done, by default one more."""
        phase.done = phase.done + 1 if done is None else done
        if self.is_terminal:
            self._refresh()
        elif time.monotonic() - phase.last_line > LONGEST_SILENCE:
            phase.last_line = time.monotonic()
            self._print(str(phase))

    def end(self, phase: Phase) -> None:
        """Remove a phase."""
        self.phases.remove(phase)
        if phase.timer is not None:
            phase.timer.cancel()
        if self.is_terminal:
            self._refresh()
        if self.verbosity is Verbosity.VERBOSE:
            self._print(f"{phase} took {time.monotonic() - phase.start:.1f} s")

    def _announce(self, phase: Phase) -> None:
        if phase in self.phases and phase.title not in self.titles:
            self.titles.add(phase.title)
            self._print(f"{phase.title} ({phase.total:,})" if phase.total else phase.title)

    def _refresh(self) -> None:
        if not self.phases:
            if self.live is not None:
                self.live.stop()
            self.live = self.spinner = None
            return
        text = " · ".join(map(str, self.phases))
        if self.spinner is None:
            self.live, self.spinner = start_spinner(text)
        else:
            self.spinner.update(text=text)

    @staticmethod
    def _print(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def start_spinner(text: str) -> "tuple[Live, Spinner]":
    """A line on stderr that moves, and goes away once it is stopped."""
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    spinner = Spinner("dots", text)
    live = Live(
        spinner,
        console=Console(stderr=True),
        refresh_per_second=REFRESH_RATE,
        transient=True,
        redirect_stdout=False,
    )
    live.start(refresh=True)
    return live, spinner


class _Settings:
    """The open screen of this process, and how much it shows."""

    screen: Screen | None = None
    verbosity: Verbosity = Verbosity.NORMAL


def get_verbosity() -> Verbosity:
    """How much is shown."""
    return _Settings.verbosity


def set_verbosity(verbosity: Verbosity) -> None:
    """Show this much from now on."""
    _Settings.verbosity = verbosity


@contextmanager
def open_screen(*, show: bool = True) -> Iterator[None]:
    """Show the phases of the block, unless a screen is open already or only warnings are to be shown."""
    if not show or _Settings.screen is not None or _Settings.verbosity is Verbosity.QUIET:
        yield
        return
    _Settings.screen = Screen(is_terminal=is_terminal(), verbosity=_Settings.verbosity)
    try:
        yield
    finally:
        _Settings.screen = None


def is_terminal() -> bool:
    """Whether stderr is a terminal on which a line can change."""
    from rich.console import Console

    return Console(stderr=True).is_terminal


@contextmanager
def status(title: str, *, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Report that the block is a phase; the function that it gives takes the number of steps done, by default one more.

    It also decorates a function, whose calls are then phases.
    """
    screen, phase = _Settings.screen, Phase(title, total)
    if screen is None:
        yield lambda *_: None
        return
    screen.begin(phase)
    try:
        yield lambda *done: screen.advance(phase, *done)
    finally:
        screen.end(phase)


def track(items: Collection[Item], title: str) -> Iterator[Item]:
    """The items, one after the other, as the steps of a phase."""
    with status(title, total=len(items)) as advance:
        for item in items:
            yield item
            advance()
