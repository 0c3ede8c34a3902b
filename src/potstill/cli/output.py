"""What all verbs do alike: answer for people or machines, and keep the libraries quiet."""

from collections.abc import Callable
from typing import Any, NamedTuple


class CommandResult(NamedTuple):
    """What a verb answers, with an exit code: 1 where it did its work and what it judged has failed."""

    output: Any
    exit_code: int


def print_or_return(value: Any, as_json: bool, print_output: Callable[[], None]) -> Any:
    """What a verb returns: `value` for JSON; for people, `show` is called and nothing is left to say."""
    if as_json:
        return value
    print_output()
    return None


def suppress_library_output() -> None:
    """The libraries' own bars and warnings stay away."""
    import datasets

    from potstill.train.run import silence_libraries

    silence_libraries()
    datasets.disable_progress_bars()
