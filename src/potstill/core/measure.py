"""A measured number. This module imports no torch, so that commands that only list and draw start at once."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One measured number: `value` in `unit` over `n` items, with a 95 % interval if there is one."""

    name: str
    value: float
    unit: str
    n: int
    better: str = "lower"  # or "higher"
    low: float | None = None
    high: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        return {k: v for k, v in vars(self).items() if v not in (None, "")}
