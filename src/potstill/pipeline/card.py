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


def write_card(folder: Path, card: Card, *, title: str, samples: str = "", curve: str = "") -> None:
    """Writes `card.json` and the README that says the same to people; `curve` is a picture beside them."""
    card.write(folder)
    write_text(folder / "README.md", readme(card, title=title, samples=samples, curve=curve))


def readme(card: Card, *, title: str, samples: str = "", curve: str = "") -> str:
    """Lineage, licence, data, cost, measures with their baseline, invariants, samples, and how to open it."""
    parts = [front_matter(card), f"# {title}", summary(card), _lineage(card), "## Use\n\n" + USE.format(name=title)]
    if card.measures:
        parts += [
            "## Measures",
            table(card.measures),
            f"Measured on {_measured_on(card)}. In brackets are 95 % intervals, by bootstrap over documents.",
        ]
    if card.cost:
        parts += ["## Cost", _facts(_cost(card))]
    if curve:
        parts += [f"![The terms of the loss over the tokens seen]({curve})"]
    if card.data:
        parts += ["## Data", _facts(_data(card.data))]
    if card.invariants:
        parts += ["## Invariants checked", _facts({i["name"]: i["outcome"] for i in card.invariants})]
    if card.details:
        parts += ["## Shape", _facts(_shape(card.details))]
    if samples:
        parts += ["## Samples", "Greedy answers, cut after some words.", samples.strip()]
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    made = f"```\n{card.command}\n```\n\nSeed {card.seed}; {versions}. `card.json` says all of this to machines."
    return "\n\n".join([*parts, "## Made by", made]) + "\n"


def summary(card: Card) -> str:
    """What this model is, in one sentence."""
    stage, details = card.stage, card.details
    origin = next((p.name for p in card.parents if p.role != "teacher"), "a model")
    cut = f"`{origin}` cut to {details['share']:.1%} of its parameters" if "share" in details else f"`{origin}`"
    if stage.get("stage") != "distill":
        return f"A language model, made by potstill: {cut}, and not trained since."
    how = f", through adapters (LoRA) of rank {stage['lora']} merged into it" if stage.get("lora") else ""
    seen = f"trained{how} on {card.cost.get('tokens', 0):,} tokens of {card.data.get('trained_on', 'text')}"
    return f"A language model, made by potstill: {cut}, {seen} under {_objective(stage)}{_written(stage)}."


def _written(stage: Mapping[str, Any]) -> str:
    share, rollout = stage.get("on_policy", 0), stage.get("rollout")
    if rollout == "distillm":
        return f", on a growing share of completions of its own (DistiLLM, from {share:.0%} on)"
    mixed = ", sampled with the teacher (MiniLLM)" if rollout == "minillm" else ""
    return f", {share:.0%} of the documents with completions of its own{mixed}" if share else ""


def _objective(stage: Mapping[str, Any]) -> str:
    objective = stage["objective"]
    share, name = objective["cross_entropy"], objective["name"].replace("_", " ")
    if name == "cross entropy" or share == 1:
        return "cross-entropy alone, so without a teacher"
    options = "".join(f", {k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in objective["options"].items())
    taught = f"{name} to {_teacher(stage)} (temperature {objective['temperature']:g}{options})"
    return taught if share == 0 else f"{share:.0%} cross-entropy and {1 - share:.0%} {taught}"


def _teacher(stage: Mapping[str, Any]) -> str:
    if isinstance(stage["teacher"], list):
        *others, last = (f"`{one}`" for one in stage["teacher"])
        return f"{', '.join(others)} and {last}, {_combined(stage['combine'])}"
    if stage["teacher"] is None:
        return f"the teacher of the cache `{stage['teacher_cache']}`"
    return f"`{stage['teacher']}`"


def _combined(combine: str) -> str:
    combination, _, column = combine.partition(":")
    said = {"average": "averaged", "confidence": "weighted by how sure each is of the text"}
    return said.get(combination, f"each for the documents that `{column}` gives it")


def _cost(card: Card) -> dict[str, str]:
    """Tokens, time and memory in units for people."""
    cost, passes = card.cost, ""
    if card.data.get("tokens"):
        passes = f", {cost['tokens'] / card.data['tokens']:.2g} passes over what was read of the text"
    losses = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in cost["losses"].items())
    return {
        "tokens": f"{cost['tokens']:,} in {cost['steps']:,} steps{passes}",
        "time": f"{_time(cost['seconds'])} ({cost['tokens_per_second']:,.0f} tokens/s)",
        "peak memory": f"{cost['peak_memory'] / 2**20:,.0f} MiB",
        "loss in the last tenth": losses,
    }


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _data(data: Mapping[str, Any]) -> dict[str, str]:
    """Which text, under which licence, and how much of it was read."""
    use = "trained on" if "trained_on" in data else "calibrated on"
    name = data.get("trained_on", data.get("calibrated_on"))
    origin = {k: v for k, v in data.get("provenance", {}).items() if v and k in ("python", "revision")}
    found = {
        use: f"{name} ({data['split']}), licence: {data['licence'] or 'not stated'}",
        "read": f"{data['documents']:,} windows, {data['tokens']:,} tokens in all, {data['trained_share']:.0%} trained",
        "SHA-256 of the text": f"`{data['text_digest']}`" if data["text_digest"] else "none, it was streamed",
    }
    if data.get("routes"):
        found["taught by"] = ", ".join(f"{name}: {windows:,} windows" for name, windows in data["routes"].items())
    if data.get("dropped"):
        found["left out"] = ", ".join(f"{count:,} with {reason}" for reason, count in data["dropped"].items())
    if origin:
        found["origin"] = _plain(origin)
    if "measured_on" in data:
        found["measured on"] = str(data["measured_on"])
    return found


def _shape(details: Mapping[str, Any]) -> dict[str, str]:
    """What is left of the parent."""
    found = {k.replace("_", " "): _plain(v) for k, v in details.get("shape", {}).items()}
    found["parameters"] = f"{details['parameters']:,} ({details['share']:.1%} of the parent's)"
    if "kept_layers" in details:
        found["layers of the parent that stayed"] = ", ".join(map(str, details["kept_layers"]))
    return found


def front_matter(card: Card) -> str:
    """The YAML that model hubs read; the licence is the one that all parents state, never a guess."""
    licences = {parent.licence for parent in card.parents}
    facts: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["potstill"]}
    if len(licences) == 1 and None not in licences:
        facts["license"] = licences.pop()
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
    if measure.low is None or measure.high is None or measure.low == measure.high or measure.unit == "tokens/s":
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
        weights = f"SHA-256 `{parent.digest}`" if parent.digest else "its weights were never seen here"
        lines.append(f"- {parent.role}: `{parent.name}`{note} (licence: {licence}; {weights})")
    return "\n".join(lines) if lines else "No parent model."


def _facts(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {_plain(value)}" for name, value in facts.items())


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
