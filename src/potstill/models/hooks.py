"""Hooks of modules that last as long as a context."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def temporary_hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Removes the hooks of these handles at the end, also after an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
