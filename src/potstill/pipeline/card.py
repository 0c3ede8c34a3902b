"""The model card: README.md in the folder of a model, written from its `card.json` alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from potstill.core.artefact import Card, write_text
from potstill.core.types import Measure

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""
SHOWN = {
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "teacher_kl": ("KL to teacher (nats)", "{:.3f}"),
    "teacher_agreement": ("agreement", "{:.3f}"),
    "rouge_l": ("ROUGE-L", "{:.1f}"),
    "parameters": ("parameters", "{:,.0f}"),
    "bytes": ("MiB", "{:.0f}"),
    "prefill_tokens_per_second": ("prefill tok/s", "{:,.0f}"),
    "decode_tokens_per_second": ("decode tok/s", "{:.1f}"),
}


def write_card(folder: Path, card: Card, *, title: str, samples: str = "") -> None:
    """Writes `card.json` and the README that says the same to people."""
    card.write(folder)
    write_text(folder / "README.md", readme(card, title=title, samples=samples))


def readme(card: Card, *, title: str, samples: str = "") -> str:
    """Lineage, licence, data, cost, measures with their baseline, invariants, samples, and how to open it."""
    parts = [front_matter(card), f"# {title}", _lineage(card), "## Use\n\n" + USE.format(name=title)]
    if card.measures:
        parts += [
            "## Measures",
            table(card.measures),
            f"Measured on {_measured_on(card)}. Intervals are 95 %, by bootstrap over documents.",
        ]
    if card.data:
        parts += ["## Data", _facts(card.data)]
    if card.cost:
        parts += ["## Cost", _facts(card.cost)]
    if card.invariants:
        parts += ["## Invariants checked", "\n".join(f"- {i['name']}: **{i['outcome']}**" for i in card.invariants)]
    if card.details:
        parts += ["## What was done", _facts({k: v for k, v in card.details.items() if not isinstance(v, Mapping)})]
    if samples:
        parts += ["## Samples", samples]
    made = f"```\n{card.command}\n```\n\n" + ", ".join(f"{k} {v}" for k, v in card.versions.items())
    return "\n\n".join([*parts, "## Made by", f"{made}; seed {card.seed}."]) + "\n"


def front_matter(card: Card) -> str:
    """The YAML that model hubs read; the licence is the parents', never a guess."""
    licences = sorted({parent.licence for parent in card.parents if parent.licence})
    facts: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["potstill"]}
    if len(licences) == 1:
        facts["license"] = licences[0]
    return f"---\n{yaml.safe_dump(facts, sort_keys=True)}---"


def table(measures: Mapping[str, Sequence[Measure]]) -> str:
    """One row a model, one column a measure, in Markdown."""
    found = {name: {m.name: m for m in given} for name, given in measures.items()}
    columns = [name for name in SHOWN if any(name in given for given in found.values())]
    lines = ["| model | " + " | ".join(SHOWN[c][0] for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for model, given in found.items():
        lines.append(f"| {model} | " + " | ".join(cell(given.get(c)) for c in columns) + " |")
    return "\n".join(lines)


def cell(measure: Measure | None) -> str:
    """A value with its interval, as it stands in a table."""
    if measure is None:
        return "-"
    value = measure.value / 2**20 if measure.name == "bytes" else measure.value
    text = SHOWN[measure.name][1].format(value)
    if measure.low is None or measure.high is None or measure.low == measure.high:
        return text
    low, high = (SHOWN[measure.name][1].format(v) for v in (measure.low, measure.high))
    return f"{text} [{low}, {high}]"


def _measured_on(card: Card) -> str:
    return str(card.data.get("measured_on", "held-out text"))


def _lineage(card: Card) -> str:
    lines = []
    for parent in card.parents:
        licence = parent.licence or "not stated; ask its authors before you share this"
        note = f", {parent.note}" if parent.note else ""
        lines.append(f"- {parent.role}: `{parent.name}`{note} (licence: {licence}; SHA-256 `{parent.digest[:16]}`)")
    return "\n".join(lines) if lines else "No parent model."


def _facts(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_plain(value)}" for name, value in facts.items())


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)
