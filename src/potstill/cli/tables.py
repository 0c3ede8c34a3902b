"""Tables and lists for people, printed with rich."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from potstill.cli.layout import build_tables
from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES, format_measure, list_columns

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


def print_dataset(out: str, details: Mapping[str, Any]) -> None:
    """Print the folder of a data set that a model wrote, what it holds, and the rows left out by reason."""
    left_out = {f"left out: {reason}": count for reason, count in details.get("left_out", {}).items()}
    facts = {name.replace("_", " "): value for name, value in details.items() if name != "left_out"}
    print_facts({"folder": out, **facts, **left_out})


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


def print_measurement(result: Mapping[str, Any]) -> None:
    """Print the result of `measure`: the measures, and how the models use a long context."""
    print_measures(result["models"], result["paired"])
    for name, rows in result.get("positions", {}).items():
        ranges = [f"{row['start']:,} to {row['stop']:,}" for row in rows]
        print_rows(("bits per byte at", *ranges), [(Text(name), *(f"{row['bits_per_byte']:.3f}" for row in rows))])
    for name, cells in result.get("needle", {}).items():
        depths = list(dict.fromkeys(cell["depth"] for cell in cells))
        accuracies = {(cell["length"], cell["depth"]): f"{cell['accuracy']:.2f}" for cell in cells}
        lengths = dict.fromkeys(cell["length"] for cell in cells)
        rows = [(Text(f"{name}, {n:,} tokens"), *(accuracies[n, depth] for depth in depths)) for n in lengths]
        print_rows(("needle found at depth", *(f"{depth:g}" for depth in depths)), rows)


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
    """Print the measures of a finished run, and the files of its folder."""
    print_measures({name: [m.to_dict() for m in model_measures] for name, model_measures in measures_by_model.items()})
    if (out / "config.json").is_file():
        print_line(f"{out} contains the model, its card (README.md, card.json), metrics.jsonl and curve.png")
    else:
        print_line(f"{out} contains {', '.join(sorted(file.name for file in out.iterdir()))}")


def print_pruned_model(out: str, details: Mapping[str, Any]) -> None:
    """Print the shape and size of a pruned model, and its folder."""
    print_facts({**details["shape"], "parameters": f"{details['parameters']:,}", "share": f"{details['share']:.1%}"})
    print_line(f"{out} contains the model and its card (README.md, card.json)")


def print_converted_model(model: str, out: str, details: Mapping[str, Any]) -> None:
    """Print the size and cost of a converted model before and after, its folder, and the command that heals it."""
    costs = ("flops_per_token", "state_bytes", "state_bytes_per_token", "weight_bytes")
    names = ("conversion", "parameters", "share", "context", *costs)
    facts = {name: details[name] for name in names}
    print_rows(("conversion", "value"), [(name, _format_cell(value)) for name, value in flatten(facts)])
    if sizes := details.get("sizes"):
        print_rows(tuple(sizes[0]), [tuple(_format_cell(value) for value in size.values()) for size in sizes])
    print_line(f"{out} contains the model and its card (README.md, card.json)")
    if not details["conversion"]["name"].startswith("packed"):
        print_line(f"potstill distill --student {out} --teacher {model} heals it")


def print_edits(result: Mapping[str, Any]) -> None:
    """Print the measures of edited facts by language, how many are learned, and the folder."""
    if result["measures"]:
        print_measures(result["measures"])
    details = result["details"]
    print_line(
        f"facts whose target is the greedy answer in every language: {details['greedy']} of {details['facts']}; "
        f"questions without their subject: {details['questions_without_subject']}"
    )
    print_line(f"{result['out']} contains edits.safetensors, edits.json and card.json")


def _format_cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


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


def print_export(result: Mapping[str, Any]) -> None:
    """Print what was written, the checks with their outcomes, and the command of each runtime."""
    facts = {name: result[name] for name in ("out", "format", "type", "architecture", "context") if name in result}
    print_facts(
        {**facts, "MiB": f"{result['bytes'] / 2**20:,.1f}", **{c["name"]: c["outcome"] for c in result["checks"]}}
    )
    for runtime, command in result["commands"].items():
        print_line(f"{runtime}: {command}")


def print_advice(result: Mapping[str, Any]) -> None:
    """Print costs and acceptance by draft length, the speed-up of each setting, and the advice."""
    lengths = list(result["verification_cost"])
    rows = [("verification, cost", *map("{:.2f}".format, result["verification_cost"].values()))]
    for draft in (draft for draft in result["drafts"] if draft["tree"] is None):
        acceptance = [draft["acceptance"][int(n) - 1] if int(n) <= len(draft["acceptance"]) else 0.0 for n in lengths]
        rows.append((f"{draft['draft']}, cost", *(f"{draft['cost'][n]:.2f}" for n in lengths)))
        rows.append((f"{draft['draft']}, accepted", *map("{:.0%}".format, acceptance)))
    print_rows(("tokens in a draft", *lengths), rows)
    print_rows(
        ("setting", "tokens per pass", "cost of a pass", "predicted", "measured", "error"),
        [_make_setting_row(setting) for setting in result["settings"]],
    )
    for difference in result.get("differences") or ():
        place = f"token {difference['token'] + 1} of answer {difference['prompt'] + 1}"
        print_line(f"{difference['flags']}: {place} differs from the text without drafts")
    print_line("costs: a pass without a draft is 1; accepted: of the tokens at this place, where all before them are")
    conditions = result["conditions"]
    threads = "1 thread" if conditions["threads"] == 1 else f"{conditions['threads']} threads"
    hardware = threads if conditions["device"] == "cpu" else conditions["device"]
    prompts = f"{result['data']['prompts']} prompts, one at a time"
    print_line(f"speeds: without drafts 1; {prompts}, {conditions['dtype']}, {hardware}")
    print_line(result["advice"]["sentence"])
    if "out" in result:
        print_line(f"{result['out']} contains advice.json and the chart speed-up.html")


def _make_setting_row(setting: Mapping[str, Any]) -> tuple[str, ...]:
    shape = f"tree {setting['tree']}" if setting["tree"] else str(setting["draft_length"])
    cost = setting["draft_cost"] + setting["verify_cost"]
    return (
        f"{setting['draft']}, {shape}",
        *(f"{value:.2f}" for value in (setting["tokens_per_pass"], cost, setting["predicted"])),
        "-" if setting["measured"] is None else f"{setting['measured']:.2f}",
        "-" if setting["error"] is None else f"{setting['error']:+.1%}",
    )


def print_line(text: str) -> None:
    """Print a sentence without markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_recipes(recipe_list: Sequence[Mapping[str, Any]]) -> None:
    """Print recipes with all their values."""
    for recipe in recipe_list:
        print_facts({k: v for k, v in recipe.items() if k not in ("stages", "origins", "bibtex")})
        for stage in recipe["stages"]:
            print_facts(stage)
        print_facts(recipe["origins"])
