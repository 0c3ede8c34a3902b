"""Reads and writes `metrics.jsonl` of a training run: one JSON object per line, one line per log of the trainer."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import write_rows
from potstill.core.errors import DataError

METRICS_FILE = "metrics.jsonl"
BOOKKEEPING_KEYS = ("step", "tokens", "epoch", "learning_rate", "grad_norm", "num_input_tokens_seen", "seconds")
BOOKKEEPING_SUFFIXES = ("_runtime", "_per_second", "_flos", "_memory")


def is_loss(name: str) -> bool:
    """Whether a number of a log is the loss or a term of it, and no bookkeeping such as the learning rate."""
    return name not in BOOKKEEPING_KEYS and not name.startswith("train_") and not name.endswith(BOOKKEEPING_SUFFIXES)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The complete lines of the file; an empty list if there is no file. A killed run may leave an incomplete last
    line.

    Raises: DataError if a complete line is not a JSON object.
    """
    if not file.exists():
        return []
    with file.open(encoding="utf-8") as lines:
        complete_lines = ((n, line) for n, line in enumerate(lines, 1) if line.endswith("\n") and line.strip())
        return [_parse_line(file, number, line) for number, line in complete_lines]


def append_metrics(file: Path, entry: Mapping[str, Any]) -> None:
    """Add a line at the end of the file."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def write_metrics(file: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file by these lines, completely or not at all."""
    write_rows(file, entries)


def _parse_line(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {number} is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise DataError(f"{file}, line {number} is not a JSON object: {line.strip()[:40]!r}")
    return entry
