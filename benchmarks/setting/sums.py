"""Sums of two digits as prompts with answers, in several languages, split by what is added.

Both orders of a sum, and its versions in all languages, are on one side of the split.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

QUESTIONS = {
    "en": "What is {a} + {b}?",
    "fr": "Combien font {a} + {b} ?",
    "es": "¿Cuánto es {a} + {b}?",
    "de": "Wie viel ist {a} + {b}?",
}


class Files(NamedTuple):
    """The prompts to train on, and those to measure on."""

    train: Path
    held_out: Path


def write_sums(
    folder: Path, *, numbers: Sequence[int] = range(10), held_out: float = 0.25, languages: Iterable[str] = ("en",)
) -> Files:
    """Writes all ordered sums of two of `numbers` in random order, a share of them held out."""
    pairs = [(a, b) for a in numbers for b in numbers if a <= b]
    generator = random.Random(0)
    generator.shuffle(pairs)
    count = round(held_out * len(pairs))
    files = Files(folder / "train.jsonl", folder / "held_out.jsonl")
    for path, part in zip(files, (pairs[count:], pairs[:count]), strict=True):
        ordered = sorted({order for a, b in part for order in ((a, b), (b, a))})
        rows = [make_row(a, b, language) for a, b in ordered for language in languages]
        generator.shuffle(rows)
        write_rows(path, rows)
    return files


def make_row(a: int, b: int, language: str) -> dict[str, Any]:
    """A sum as the row of a data set of prompts; versions in several languages have one `id`."""
    question = QUESTIONS[language].format(a=a, b=b)
    return {"prompt": question, "answer": str(a + b), "language": language, "id": f"{a}+{b}"}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
