"""Chooses which parameters of a student are trained, by their names."""

import re
from collections.abc import Iterable

from torch import nn

from potstill.core.errors import UsageError


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of `--train`, which is searched in the name of each parameter.

    Raises: UsageError if it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--train {pattern!r} is no regular expression ({error}); see Python's module re") from error


def match_names(names: Iterable[str], pattern: str) -> frozenset[str]:
    """The names that `pattern` matches.

    Raises: UsageError if it matches none.
    """
    names, expression = list(names), compile_pattern(pattern)
    matches = frozenset(name for name in names if expression.search(name))
    if not matches:
        raise UsageError(f"--train {pattern!r} matches no parameter of the student, such as {', '.join(names[-3:])}")
    return matches


def select_parameters(model: nn.Module, pattern: str) -> None:
    """Lets gradients reach the parameters of `model` that `pattern` matches, and freezes all others.

    Raises: UsageError if it matches none.
    """
    matches = match_names((name for name, _ in model.named_parameters()), pattern)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in matches)
