"""Frozen values as plain JSON data, and back."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from potstill.core.errors import ArtefactError

Facts = tuple[tuple[str, Any], ...]  # a mapping that hashes: pairs of a name and a frozen value


def frozen(value: Any) -> Any:
    """`value` with mappings as sorted pairs and lists as tuples, so that it hashes; plain values stay as they are."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(k), frozen(v)) for k, v in value.items()))
    return tuple(frozen(v) for v in value) if isinstance(value, list | tuple) else value


def thawed(value: Any) -> Any:
    """`value` with tuples as lists, all the way down, as JSON has it."""
    if isinstance(value, Mapping):
        return {k: thawed(v) for k, v in value.items()}
    return [thawed(v) for v in value] if isinstance(value, list | tuple) else value


def checked(made: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` as arguments of the dataclass `made`; those with a default may be absent.

    Raises: ArtefactError where a key is unknown or missing.
    """
    known = {f.name: f for f in fields(made)}
    if unknown := sorted(set(data) - set(known)):
        raise ArtefactError(f"{made.__name__} has no {', '.join(unknown)}; it holds {', '.join(known)}")
    required = (name for name, f in known.items() if f.default is MISSING)
    if missing := sorted(set(required) - set(data)):
        raise ArtefactError(f"{made.__name__} lacks {', '.join(missing)}")
    return dict(data)
