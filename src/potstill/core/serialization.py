"""Turns frozen values into plain JSON data, and back."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from potstill.core.errors import ArtifactError

Facts = tuple[tuple[str, Any], ...]  # a hashable mapping: pairs of a name and a frozen value


def freeze(value: Any) -> Any:
    """`value` with mappings as sorted pairs and lists as tuples, at every depth, so that it can be hashed."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(k), freeze(v)) for k, v in value.items()))
    return tuple(freeze(v) for v in value) if isinstance(value, list | tuple) else value


def thaw(value: Any) -> Any:
    """`value` with tuples as lists, at every depth, as JSON has them."""
    if isinstance(value, Mapping):
        return {k: thaw(v) for k, v in value.items()}
    return [thaw(v) for v in value] if isinstance(value, list | tuple) else value


def check_fields(dataclass_type: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` as arguments of `dataclass_type`; fields with a default may be absent.

    Raises: ArtifactError for an unknown or a missing key.
    """
    fields_by_name = {f.name: f for f in fields(dataclass_type)}
    if unknown := sorted(set(data) - set(fields_by_name)):
        raise ArtifactError(
            f"{dataclass_type.__name__} has no {', '.join(unknown)}; it holds {', '.join(fields_by_name)}"
        )
    required = (name for name, f in fields_by_name.items() if f.default is MISSING)
    if missing := sorted(set(required) - set(data)):
        raise ArtifactError(f"{dataclass_type.__name__} lacks {', '.join(missing)}")
    return dict(data)
