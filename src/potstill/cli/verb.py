"""What all verbs do alike: answer for people or machines, and keep the libraries quiet."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """What a verb answers, with an exit code: 1 where it did its work and what it judged has failed."""

    answer: Any
    code: int


def answer(value: Any, as_json: bool, show: Callable[[], None]) -> Any:
    """What a verb returns: `value` for JSON; for people, `show` is called and nothing is left to say."""
    if as_json:
        return value
    show()
    return None


def hush() -> None:
    """The libraries' own bars and warnings stay away."""
    import datasets

    from potstill.train.run import quiet

    quiet()
    datasets.disable_progress_bars()
