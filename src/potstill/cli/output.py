"""Functions that all commands share: output as JSON or as tables, and quiet libraries."""

from collections.abc import Callable
from typing import Any, NamedTuple


class CommandResult(NamedTuple):
    """The output of a command, and its exit code: 1 if the command ran but one of its checks failed."""

    output: Any
    exit_code: int


def print_or_return(value: Any, as_json: bool, print_output: Callable[[], None]) -> Any:
    """`value`, if the output is JSON; else call `print_output` and return None."""
    if as_json:
        return value
    print_output()
    return None


def suppress_library_output() -> None:
    """Turn off the progress bars and warnings of the libraries."""
    import datasets

    from potstill.train.run import silence_libraries

    silence_libraries()
    datasets.disable_progress_bars()
