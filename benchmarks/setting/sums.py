"""Sums of two digits as prompts with answers, in several languages, split by what is added.

Both orders of a sum, and its versions in all languages, are on one side of the split.
"""

import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from potstill.core.atomic_files import write_rows
from setting.runs import is_finished

PROMPTS, SAMPLES = 6, 8  # of a step, and of a prompt
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
    folder.mkdir(parents=True, exist_ok=True)
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


def train_grpo(
    out: Path, model: str | Path, files: Files, *, objective: str, reward: str, context: int, steps: int, **options: Any
) -> None:
    """GRPO on the sums in `steps` steps of `PROMPTS` prompts with `SAMPLES` samples, unless `out` is finished."""
    import potstill

    if not is_finished(out):
        print(f"training {out.name}", file=sys.stderr)
        potstill.align(
            str(model),
            objective=objective,
            reward=reward,
            data=str(files.train),
            eval_data=str(files.held_out),
            samples=SAMPLES,
            context=context,
            prompts_per_step=PROMPTS,
            tokens=steps * PROMPTS * context,
            out=out,
            resume=out.exists(),
            **options,
        )
