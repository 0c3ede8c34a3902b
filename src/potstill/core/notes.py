"""Notes and warnings on stderr, from the main process only."""

import logging
import sys

from potstill.core.ranks import is_main_process
from potstill.core.screen import Verbosity, get_verbosity


class NoteHandler(logging.Handler):
    """Prints the records of a logger as lines on stderr, on the main process only; with --quiet, nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of `record`."""
        if get_verbosity() > Verbosity.QUIET:
            _print_line(record.getMessage())


def print_note(text: str) -> None:
    """Print a line on stderr, on the main process only, about a fact that is worth knowing but not an error.

    With --quiet, nothing is printed.
    """
    if get_verbosity() > Verbosity.QUIET:
        _print_line(f"note: {text}")


def print_warning(text: str) -> None:
    """Print a line on stderr, on the main process only, about something that makes the result worse."""
    _print_line(f"warning: {text}")


def _print_line(line: str) -> None:
    if is_main_process():
        print(line, file=sys.stderr)
