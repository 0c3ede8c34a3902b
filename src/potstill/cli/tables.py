"""Tables and lists for people, printed with rich."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from potstill.cli.layout import build_tables
from potstill.core.measure_table import MEASURES, format_measure, list_columns
from potstill.core.types import Measure

PIPE_WIDTH = 120  # of a file or a pipe, which has no width of its own; COLUMNS sets another one
OUTCOME_COLORS = {"pass": "green", "fail": "bold red", "note": "yellow"}

console = Console()
if not console.is_terminal and not os.environ.get("COLUMNS"):
    console = Console(width=PIPE_WIDTH)


def print_rows(headers: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    """Print rows under their headers, in several tables where the terminal is too narrow for one."""
    for number, table in enumerate(build_tables(headers, rows, width=console.width)):
        if number:
            console.print()
        console.print(table)
    console.print()


def print_table(rows: Sequence[Mapping[str, Any]], *columns: str) -> None:
    """Print rows of plain values, one column for each name in `columns`."""
    print_rows(columns, [[str(row.get(column, "")) for column in columns] for row in rows])


def print_checks(results: Sequence[Mapping[str, str]]) -> None:
    """Print each check with its outcome, what it found, what to do if it failed, and why it matters."""
    print_rows(("check", "outcome", "result"), [_make_check_row(check) for check in results])


def _make_check_row(check: Mapping[str, str]) -> tuple[Text, Text, Text]:
    outcome = Text(check["outcome"], style=OUTCOME_COLORS[check["outcome"]])
    remedy = f"\nto do: {check['remedy']}" if "remedy" in check else ""
    return Text(check["name"]), outcome, Text.assemble(check["found"] + remedy, "\n", (check["why"], "dim"))


def print_facts(values: Mapping[str, Any]) -> None:
    """Print names and values, one per line."""
    print_rows(("setting", "value"), [(name, Text(str(value))) for name, value in flatten(values)])


def flatten(values: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values; nested ones are named `outer.inner`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, prefix=f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            yield from flatten({str(n): item for n, item in enumerate(value, 1)}, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def print_measures(
    models: Mapping[str, Sequence[Mapping[str, Any]]], paired_differences: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Print one row per model and one column per measure, with intervals; then the difference of every two models."""
    measures_by_model = {
        name: {m["name"]: Measure(**m) for m in model_measures} for name, model_measures in models.items()
    }
    columns = list_columns(measures_by_model.values())
    rows: list[tuple[str | Text, ...]] = [
        (Text(name), *(format_measure(model_measures.get(info.name)) for info in columns))
        for name, model_measures in measures_by_model.items()
    ]
    print_rows(("model", *(info.column for info in columns)), rows)
    if paired_differences:
        print_differences(paired_differences)


def print_differences(paired_differences: Sequence[Mapping[str, Any]]) -> None:
    """Print each measure of model a minus that of model b, with its interval, paired by document, for every two
    models."""
    names = list(dict.fromkeys(entry["name"] for entry in paired_differences))
    rows: list[tuple[str, ...]] = []
    for a, b in dict.fromkeys((entry["a"], entry["b"]) for entry in paired_differences):
        entries = {entry["name"]: entry for entry in paired_differences if (entry["a"], entry["b"]) == (a, b)}
        rows.append((f"{a} - {b}", *(format_difference(entries[name]) if name in entries else "" for name in names)))
    print_rows(("paired by document: a - b", *(MEASURES[name].column for name in names)), rows)


def format_difference(entry: Mapping[str, Any]) -> str:
    """`-0.402 [-0.458, -0.356]`."""
    return f"{entry['value']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"


def print_run(out: Path, measures_by_model: Mapping[str, Sequence[Measure]]) -> None:
    """Print the measures of a finished run, and its folder."""
    print_measures({name: [m.to_dict() for m in model_measures] for name, model_measures in measures_by_model.items()})
    print_line(f"{out} contains the model, its card (README.md, card.json), metrics.jsonl and curve.png")


def print_pruned_model(out: str, details: Mapping[str, Any]) -> None:
    """Print the shape and size of a pruned model, and its folder."""
    print_facts({**details["shape"], "parameters": f"{details['parameters']:,}", "share": f"{details['share']:.1%}"})
    print_line(f"{out} contains the model and its card (README.md, card.json)")


def print_models(model_list: Sequence[Mapping[str, Any]]) -> None:
    """Print models with their size and license."""
    rows = [
        {**m, "MiB": f"{m['bytes'] / 2**20:,.0f}" if m["bytes"] else "-", "license": m["licence"] or "not stated"}
        for m in model_list
    ]
    print_table(rows, "name", "MiB", "license", "path")


def print_caches(manifests: Sequence[Mapping[str, Any]]) -> None:
    """Print caches of teachers, one per line."""
    rows = [
        {
            "cache": manifest["out"],
            "teacher": manifest["names"]["teacher"],
            "text": manifest["names"]["text"],
            "rows": f"{manifest['rows']:,}",
            "tokens a row": f"{manifest['ids'] / manifest['rows']:.1f} {manifest['kept']}",
            "bytes a row": f"{manifest['bytes'] / manifest['rows']:.0f}",
            "MiB": f"{manifest['bytes'] / 2**20:,.1f}",
        }
        for manifest in manifests
    ]
    print_table(rows, *(rows[0] if rows else ("cache",)))


def print_corpus(description: Mapping[str, Any], *, show_tokens: bool) -> None:
    """Print a description of a data set; with `show_tokens`, colored examples too."""
    from potstill.data.preview import render

    shown = description if show_tokens else {**description, "examples": []}
    console.print(render(shown, marks=not console.is_terminal))


def print_push(result: Mapping[str, Any]) -> None:
    """Print the files of an upload with their sizes, the repository, and where the commit is."""
    print_table([{"file": name, "bytes": f"{size:,}"} for name, size in result["files"].items()], "file", "bytes")
    license_name = result["license"] or "not stated; ask the authors of its parents before you share it"
    print_line(f"license: {license_name}")
    is_done = (
        f"uploaded to {result['url']}" if result["url"] else f"nothing is uploaded; {result['repo']} is the target"
    )
    print_line(f"{result['bytes']:,} bytes; {is_done}")


def print_line(text: str) -> None:
    """Print a sentence without markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_recipes(recipe_list: Sequence[Mapping[str, Any]], *, with_details: bool) -> None:
    """Print all recipes in a table, or with details."""
    if not with_details:
        print_table(recipe_list, "name", "summary", "source")
        return
    for recipe in recipe_list:
        print_facts({k: v for k, v in recipe.items() if k not in ("stages", "origins", "bibtex")})
        for stage in recipe["stages"]:
            print_facts(stage)
        print_facts(recipe["origins"])
