"""What is known of a measure before it is taken: its name, title, unit and format."""

from dataclasses import dataclass
from typing import Any, Literal

from potstill.core.measure import Measure


@dataclass(frozen=True, kw_only=True)
class MeasureInfo:
    """The name, titles, unit and format of one measure.

    `title` labels the axis of a chart and `column` heads a column, both in the unit shown, which is `unit` times
    `scale`. `decimals` is the number of digits after the point in a table. Only charts and JSON show a measure without
    `in_tables`: perplexity repeats bits per byte, acceptance matters to drafts alone, bytes on disk depend on the
    precision of the file, and peak memory belongs to one speed test.
    """

    name: str
    title: str
    column: str
    unit: str
    better: Literal["lower", "higher"]
    kind: Literal["quality", "cost"]
    decimals: int = 0
    scale: int = 1
    in_tables: bool = True

    def build(self, value: float, n: int, **details: Any) -> Measure:
        """The measure with this value over `n` things; `details` are its bounds and its note."""
        return Measure(self.name, value, self.unit, n, better=self.better, **details)

    def format(self, value: float, *, extra_decimals: int = 0) -> str:
        """`value`, given in `unit`, as a table shows it."""
        if self.name == "parameters":
            return format_parameters(value)
        return f"{value / self.scale:,.{self.decimals + extra_decimals}f}"


def format_parameters(value: float) -> str:
    """A number of parameters in short form: `1.24B`, `134.5M`, `12.3k`, `987`."""
    for least, unit, letter, decimals in ((1e9, 1e9, "B", 2), (1e6, 1e6, "M", 1), (1e4, 1e3, "k", 1)):
        if value >= least:
            return f"{value / unit:.{decimals}f}{letter}"
    return f"{value:,.0f}"
