"""`--dry-run` on the command line: prints what a run would do, and saves its options for `--config`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from potstill.cli import options as o
from potstill.cli.output import print_or_return
from potstill.core.atomic_files import write_text
from potstill.core.notes import print_note

MARK = "# Options that a dry run of potstill saved. Run them with:"
BYTES = ("memory", "disk")  # the parts of a report that count bytes


def show_dry_run(
    command: str,
    report: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    out: str | None,
    as_json: bool,
    print_report: Callable[[Mapping[str, Any]], None] | None = None,
) -> Any:
    """Print the report of a dry run, or return it for JSON; save the options to OUT.yaml where there is an `out`."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    values = {name: value for name, value in values.items() if value not in (None, [])}
    file = None if out is None else save_options(command, {"out": out, **values}, o.expand_path(out))
    config = None if file is None else str(file)

    def print_output() -> None:
        from potstill.cli import tables

        (print_report or print_facts)(report)
        if config is not None:
            tables.print_line(f"potstill {command} --config {config} runs this")

    return print_or_return({**report, "config": config}, as_json, print_output)


def save_options(command: str, options: Mapping[str, Any], out: Path) -> Path | None:
    """Write OUT.yaml, unless a file of the user has that name; the path that was written, or None."""
    import yaml

    target = out if out.name else out.resolve()  # `.` has no name
    file = target.with_name(f"{target.name}.yaml")
    if file.exists() and not file.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        print_note(f"{file} is your own file, so the options of this dry run are not saved")
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
    write_text(file, f"{MARK}\n# potstill {command} --config {file}\n{content}")
    return file


def print_facts(report: Mapping[str, Any]) -> None:
    """Print the facts of a report in a table, without the options and without what is not known."""
    from potstill.cli import tables

    facts = {name: value for name, value in report.items() if name != "stage"}
    rows = [(name, _format(name, value)) for name, value in tables.flatten(facts) if value is not None]
    tables.print_rows(("dry run", "value"), rows)


def _format(name: str, value: Any) -> str:
    if name.split(".")[0] in BYTES:
        return f"{value / 2**30:,.2f} GiB"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
