"""What people see: tables and facts, by rich."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from potstill.core.types import Measure
from potstill.pipeline.card import SHOWN, cell

console = Console()


def table(rows: Sequence[Mapping[str, Any]], *columns: str) -> None:
    """Rows of plain values."""
    drawn = Table(*columns)
    for row in rows:
        drawn.add_row(*(str(row.get(c, "")) for c in columns))
    console.print(drawn)


def facts(values: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    drawn = Table("setting", "value")
    for name, value in values.items():
        drawn.add_row(name, str(value))
    console.print(drawn)


def measures(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """One row a model, one column a measure, with intervals."""
    found = {name: {m["name"]: Measure(**m) for m in given} for name, given in models.items()}
    columns = [c for c in SHOWN if any(c in given for given in found.values())]
    drawn = Table("model", *(SHOWN[c][0] for c in columns))
    for name, given in found.items():
        drawn.add_row(name, *(cell(given.get(c)) for c in columns))
    console.print(drawn)


def run(result: Any) -> None:
    """The measures of a finished run and where it lies."""
    measures({name: [m.to_dict() for m in found] for name, found in result.measures.items()})
    console.print(f"[bold]{result.out}[/] holds the model, its card (README.md, card.json) and metrics.jsonl")


def recipes(found: Sequence[Mapping[str, Any]], *, whole: bool) -> None:
    """All recipes in a table, or one of them whole."""
    if not whole:
        table(found, "name", "summary", "source")
        return
    for recipe in found:
        facts({k: v for k, v in recipe.items() if k not in ("stages", "origins")})
        for stage in recipe["stages"]:
            facts(stage)
        facts(recipe["origins"])
