"""potstill makes language models small and fast: a teacher and a budget go in, a small, measured student comes out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.api import distill, measure, prune

__all__ = ["distill", "measure", "prune"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The verbs of `potstill.api`, imported when they are first asked for, so that `import potstill` is quick."""
    if name in __all__:
        from potstill import api

        return getattr(api, name)
    raise AttributeError(f"module 'potstill' has no attribute {name!r}")
