"""potstill makes language models small and fast: it distills a teacher into a small student and measures both."""

from importlib import import_module
from typing import Any

_VERBS = (
    *("distill", "align", "prune", "convert", "measure", "frontier", "generate", "plan"),
    *("doctor", "arena", "cache", "load", "data", "export", "advise", "edit", "run"),
)
__all__ = ["AutoModelForCausalLM", *_VERBS]  # __init__.pyi has their types
__version__ = "0.1.0"

# The class of transformers; importing it from here registers potstill's own architecture.
_MODULES = {"AutoModelForCausalLM": "potstill.models.hf_causal_lm"}


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use, so that `import potstill` is quick."""
    if name == "data":
        return import_module("potstill.data")  # a package that can be called
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, "potstill.api")), name)
    raise AttributeError(f"module 'potstill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
