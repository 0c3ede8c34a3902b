"""What people see: tables and facts, by rich."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from potstill.core.types import Measure
from potstill.pipeline.card import SHOWN, cell

console = Console()
if not console.is_terminal:
    console = Console(width=140)  # a file or a pipe has no width of its own


def table(rows: Sequence[Mapping[str, Any]], *columns: str) -> None:
    """Rows of plain values."""
    drawn = Table(*columns)
    for row in rows:
        drawn.add_row(*(Text(str(row.get(c, ""))) for c in columns))
    console.print(drawn)


COLOURS = {"pass": "green", "fail": "bold red", "note": "yellow"}


def checks(found: Sequence[Mapping[str, str]]) -> None:
    """Each invariant with its outcome and why it matters; what to do where one fails."""
    drawn = Table("invariant", "outcome", "found", "why it matters")
    for one in found:
        outcome = Text(one["outcome"], style=COLOURS[one["outcome"]])
        remedy = f"\nto do: {one['remedy']}" if "remedy" in one else ""
        drawn.add_row(one["name"], outcome, Text(one["found"] + remedy), Text(one["why"]))
    console.print(drawn)


def facts(values: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    drawn = Table("setting", "value")
    for name, value in flat(values):
        drawn.add_row(name, Text(str(value)))
    console.print(drawn)


def flat(values: Mapping[str, Any], *, within: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, nested ones under `outer.inner`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, within=f"{within}{name}.")
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            yield from flat({str(n): one for n, one in enumerate(value, 1)}, within=f"{within}{name}.")
        else:
            yield f"{within}{name}", value


def measures(models: Mapping[str, Sequence[Mapping[str, Any]]], paired: Sequence[Mapping[str, Any]] = ()) -> None:
    """One row a model, one column a measure, with intervals; then every two models compared on the same documents."""
    found = {name: {m["name"]: Measure(**m) for m in given} for name, given in models.items()}
    columns = [c for c in SHOWN if any(c in given for given in found.values())]
    drawn = Table("model", *(SHOWN[c][0] for c in columns))
    for name, given in found.items():
        drawn.add_row(name, *(cell(given.get(c)) for c in columns))
    console.print(drawn)
    if paired:
        differences(paired)


def differences(paired: Sequence[Mapping[str, Any]]) -> None:
    """Of every two models a and b what a has more of each measure than b, with its interval, paired by document."""
    names = list(dict.fromkeys(one["name"] for one in paired))
    drawn = Table("paired by document: a - b", *(SHOWN[name][0] for name in names))
    for a, b in dict.fromkeys((one["a"], one["b"]) for one in paired):
        found = {one["name"]: one for one in paired if (one["a"], one["b"]) == (a, b)}
        drawn.add_row(f"{a} - {b}", *(difference(found[name]) if name in found else "" for name in names))
    console.print(drawn)


def difference(one: Mapping[str, Any]) -> str:
    """`-0.402 [-0.458, -0.356]`."""
    return f"{one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def run(out: Path, measured: Mapping[str, Sequence[Measure]]) -> None:
    """The measures of a finished run and where it lies."""
    measures({name: [m.to_dict() for m in found] for name, found in measured.items()})
    said(f"{out} holds the model, its card (README.md, card.json), metrics.jsonl and curve.png")


def pruned(out: str, details: Mapping[str, Any]) -> None:
    """What is left of a model and where it lies."""
    facts({**details["shape"], "parameters": f"{details['parameters']:,}", "share": f"{details['share']:.1%}"})
    said(f"{out} holds the model and its card (README.md, card.json)")


def models(found: Sequence[Mapping[str, Any]]) -> None:
    """Models with their size and licence."""
    rows = [
        {**m, "MiB": f"{m['bytes'] / 2**20:,.0f}" if m["bytes"] else "-", "licence": m["licence"] or "not stated"}
        for m in found
    ]
    table(rows, "name", "MiB", "licence", "path")


def caches(found: Sequence[Mapping[str, Any]]) -> None:
    """Teachers' caches, one a line."""
    rows = [
        {
            "cache": one["out"],
            "teacher": one["names"]["teacher"],
            "text": one["names"]["text"],
            "rows": f"{one['rows']:,}",
            "tokens a row": f"{one['ids'] / one['rows']:.1f} {one['kept']}",
            "bytes a row": f"{one['bytes'] / one['rows']:.0f}",
            "MiB": f"{one['bytes'] / 2**20:,.1f}",
        }
        for one in found
    ]
    table(rows, *(rows[0] if rows else ("cache",)))


def corpus(description: Mapping[str, Any], *, tokens: bool) -> None:
    """What a data set is; with `tokens` its coloured examples too."""
    from potstill.data.show import render

    console.print(render(description if tokens else {**description, "examples": []}))


def said(text: str) -> None:
    """A sentence, with nothing in it taken for markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def recipes(found: Sequence[Mapping[str, Any]], *, whole: bool) -> None:
    """All recipes in a table, or one of them whole."""
    if not whole:
        table(found, "name", "summary", "source")
        return
    for recipe in found:
        facts({k: v for k, v in recipe.items() if k not in ("stages", "origins", "bibtex")})
        for stage in recipe["stages"]:
            facts(stage)
        facts(recipe["origins"])
