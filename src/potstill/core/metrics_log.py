"""The metrics.jsonl file of a training run."""

import json
from pathlib import Path


def read_metrics(file: Path) -> list[dict[str, int | float]]:
    """The whole lines of a metrics file; nothing where there is none."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
