"""The model card: `README.md` in the folder of a model, written from its `card.json` alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import write_text
from potstill.core.card import Card
from potstill.core.measure import Measure
from potstill.core.measure_table import format_measure, list_columns
from potstill.stages.card_usage import SavedFacts, format_draft_usage, format_serving, format_usage
from potstill.stages.front_matter import HUB_SOURCE, format_front_matter, list_sources
from potstill.stages.public_names import get_public_data_name, get_public_name, hide_folders, hide_folders_in


def write_card(folder: Path, card: Card, *, title: str, samples: str = "", curve: str = "") -> None:
    """Write `card.json`, and a README with the same facts for people; `curve` names a picture in the folder."""
    card.write(folder)
    facts = SavedFacts.from_folder(folder)
    write_text(folder / "README.md", format_readme(card, facts, title=title, samples=samples, curve=curve))


def format_readme(card: Card, facts: SavedFacts, *, title: str, samples: str = "", curve: str = "") -> str:
    """The README: lineage, use, measures, cost, data, checks, shape, samples and the command that made the model.

    Of a path it has the last part alone.
    """
    parts = [
        format_front_matter(card, title=title),
        f"# {title}",
        format_summary(card),
        _format_lineage(card),
        "## Use\n\n" + format_usage(title, facts, transformers_version=card.versions["transformers"]),
    ]
    if draft_usage := format_draft_usage(card, title=title):
        parts += [draft_usage]
    parts += format_serving(title, facts)
    if any(card.measures.values()):
        parts += [
            "## Measures",
            format_measures_table(card.measures),
            f"Measured on {_describe_measured_text(card.data)}, with the weights as they are saved. In "
            f"brackets are 95 % intervals, by bootstrap over documents. `MiB in bf16` counts two bytes a parameter for "
            f"every model, whatever the precision of its file.",
        ]
    if card.cost:
        parts += ["## Cost", _format_facts(_describe_cost(card))]
    if curve:
        parts += [f"![The terms of the loss over the tokens seen]({curve})"]
    if card.data:
        parts += ["## Data", _format_facts(hide_folders_in(_describe_data(card.data)))]
    if card.invariants:
        parts += ["## Checks", _format_facts({i["name"]: i["outcome"] for i in card.invariants})]
    if card.details:
        parts += ["## Shape", _format_facts(_describe_shape(card.details))]
    if card.failures:
        parts += ["## Not in this card", _format_facts(hide_folders_in(card.failures))]
    if samples:
        parts += ["## Samples", "Greedy answers, cut after some words.", samples.strip()]
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    facts_note = "`card.json` has the same facts for programs."
    provenance = f"```\n{hide_folders(card.command)}\n```\n\nSeed {card.seed}; {versions}. {facts_note}"
    return "\n\n".join([*parts, "## Made by", provenance]) + "\n"


def format_summary(card: Card) -> str:
    """One sentence about the origin of the model: its parent, its training and its objective."""
    stage, details = card.stage, card.details
    origin = next((get_public_name(p.name) for p in card.parents if p.role != "teacher"), "a model")
    origin_phrase = f"`{origin}`"
    if "conversion" in details:
        origin_phrase += f" converted to {details['conversion']['name']}"
    elif "share" in details:
        origin_phrase += f" pruned to {details['share']:.1%} of its parameters"
    if stage.get("stage") not in ("distill", "align"):
        return f"A language model from potstill: {origin_phrase}, without training after that."
    adapter_phrase = f", through adapters (LoRA) of rank {stage['lora']} merged into it" if stage.get("lora") else ""
    part_phrase = f" (only parameters named `{stage['train']}`)" if stage.get("train") else ""
    text = get_public_data_name(str(card.data.get("trained_on", "text")))
    training_phrase = f"trained{adapter_phrase}{part_phrase} on {card.cost.get('tokens', 0):,} tokens of {text}"
    if stage["stage"] == "align":
        return f"A language model from potstill: {origin_phrase}, {training_phrase} with {_describe_alignment(stage)}."
    method = f"{_describe_objective(stage)}{_describe_rollout(stage)}"
    return f"A language model from potstill: {origin_phrase}, {training_phrase} with {method}."


def _describe_alignment(stage: Mapping[str, Any]) -> str:
    """The objective, and the frozen models that it compares with."""
    names = [(name, stage.get(name)) for name in ("reference", "reference_cache", "plus", "minus", "reward")]
    phrases = [f"{name.replace('_', ' ')} `{get_public_name(value)}`" for name, value in names if value]
    return f"`{stage['objective']}`{''.join(f', {phrase}' for phrase in phrases)}"


def _describe_rollout(stage: Mapping[str, Any]) -> str:
    share, rollout = stage.get("on_policy", 0), stage.get("rollout")
    if rollout == "distillm":
        return f", on a growing share of its own completions (DistiLLM, from {share:.0%} on)"
    sampling_phrase = ", sampled with the teacher (MiniLLM)" if rollout == "minillm" else ""
    return f", {share:.0%} of the documents with its own completions{sampling_phrase}" if share else ""


def _describe_objective(stage: Mapping[str, Any]) -> str:
    objective = stage["objective"]
    share, name = objective["cross_entropy"], objective["name"].replace("_", " ")
    if name == "cross entropy" or share == 1:
        return "cross-entropy alone, without a teacher"
    options = "".join(f", {k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in objective["options"].items())
    distillation_phrase = f"{name} to {_describe_teacher(stage)} (temperature {objective['temperature']:g}{options})"
    return distillation_phrase if share == 0 else f"{share:.0%} cross-entropy and {1 - share:.0%} {distillation_phrase}"


def _describe_teacher(stage: Mapping[str, Any]) -> str:
    if isinstance(stage["teacher"], list):
        *previous_names, last_name = (f"`{get_public_name(name)}`" for name in stage["teacher"])
        return f"{', '.join(previous_names)} and {last_name}, {_describe_combination(stage['combine'])}"
    if stage["teacher"] is None:
        return f"the teacher of the cache `{get_public_name(stage['teacher_cache'])}`"
    return f"`{get_public_name(stage['teacher'])}`"


def _describe_combination(combine: str) -> str:
    combination, _, column = combine.partition(":")
    phrases = {"average": "averaged", "confidence": "weighted by the probability that each gives the text"}
    return phrases.get(combination, f"each on the documents that `{column}` assigns to it")


def _describe_cost(card: Card) -> dict[str, str]:
    """Tokens, time and memory in readable units."""
    cost, passes = card.cost, ""
    if card.data.get("tokens"):
        passes = f", {cost['tokens'] / card.data['tokens']:.2g} passes over the text that was read"
    losses = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in cost["losses"].items())
    return {
        "tokens": f"{cost['tokens']:,} in {cost['steps']:,} steps{passes}",
        "time": f"{_format_duration(cost['seconds'])} ({cost['tokens_per_second']:,.0f} tokens/s)",
        "peak memory": f"{cost['peak_memory'] / 2**20:,.0f} MiB",
        "loss in the last tenth": losses,
    }


def _format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _describe_data(data: Mapping[str, Any]) -> dict[str, str]:
    """The text, its license, and how much of it was used."""
    windows = data.get("windows", {})
    usage = "trained on" if "trained_on" in data else "calibrated on"
    name = get_public_data_name(str(data.get("trained_on", data.get("calibrated_on"))))
    origin = {k: v for k, v in data.get("provenance", {}).items() if v and k in ("python", "packages", "revision")}
    facts = {
        usage: f"{name} ({data['split']}), license: {data['licence'] or 'not stated'}",
        "read": f"{data['documents']:,} windows, {data['tokens']:,} tokens in all, {data['trained_share']:.0%} trained",
        "SHA-256 of the text": f"`{data['text_digest']}`" if data["text_digest"] else "none, it was streamed",
    }
    if vocabulary := data.get("draft_vocabulary"):
        facts["tokens that it drafts"] = f"{vocabulary['tokens']:,}, {vocabulary['share']:.1%} of the trained tokens"
    if "sources" in data.get("provenance", {}):
        facts["data sets"] = "; ".join(map(_describe_source, list_sources(data)))
    if data.get("routes"):
        facts["taught by"] = ", ".join(f"{name}: {windows:,} windows" for name, windows in data["routes"].items())
    if data.get("dropped"):
        facts["left out"] = ", ".join(f"{count:,} with {reason}" for reason, count in data["dropped"].items())
    if unread := data.get("provenance", {}).get("unread_text"):
        facts["columns of text that were not read"] = ", ".join(unread)
    if any(windows.get(name) for name in ("shortened", "cut")):
        facts["longer than the context"] = (
            f"of {windows['documents']:,} documents, {windows.get('shortened', 0):,} have an answer that lost the "
            f"beginning of what precedes it, and {windows.get('cut', 0):,} an answer that lost its end; 99 % have at "
            f"most {windows['longest']:,} tokens"
        )
    if origin:
        facts["origin"] = _format_value(origin)
    if "measured_on" in data:
        facts["measured on"] = _describe_measured_text(data)
    return facts


def _describe_source(source: Mapping[str, Any]) -> str:
    """One data set of a mixture: its name, and its share of the text."""
    name = get_public_name(source["source"].removeprefix(HUB_SOURCE))
    weight = "" if source["weight"] is None else f", weight {source['weight']:g}"
    revision = f", revision {source['revision']}" if source.get("revision") else ""
    return f"`{name}` ({source['documents']:,} documents{weight}{revision})"


def _describe_shape(details: Mapping[str, Any]) -> dict[str, str]:
    """The shape of the model compared with its parent."""
    facts = {k.replace("_", " "): _format_value(v) for k, v in details.get("shape", {}).items()}
    facts["parameters"] = f"{details['parameters']:,} ({details['share']:.1%} of the parent's)"
    if "conversion" in details:
        facts["conversion"] = _format_value(details["conversion"])
        flops, states, weights = (details[name] for name in ("flops_per_token", "state_bytes", "weight_bytes"))
        length = f"at {details['context']:,} tokens"
        facts[f"FLOPs for a token {length}"] = f"{flops['after']:,.0f} (before: {flops['before']:,.0f})"
        facts[f"bytes of states in bf16 {length}"] = f"{states['after']:,} (before: {states['before']:,})"
        facts["bytes of weights in bf16"] = f"{weights['after']:,} (before: {weights['before']:,})"
    for size in details.get("sizes", ()):
        facts[f"size {size['share']:g}"] = _format_value({k: v for k, v in size.items() if k != "share"})
    if "kept_layers" in details:
        facts["layers of the parent that remain"] = ", ".join(map(str, details["kept_layers"]))
    return facts


def format_measures_table(measures: Mapping[str, Sequence[Measure]]) -> str:
    """A Markdown table with a row for each model and a column for each measure."""
    measures_by_model = {name: {m.name: m for m in model_measures} for name, model_measures in measures.items()}
    columns = list_columns(measures_by_model.values())
    lines = ["| model | " + " | ".join(info.column for info in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for model, model_measures in measures_by_model.items():
        lines.append(f"| {model} | " + " | ".join(format_measure(model_measures.get(c.name)) for c in columns) + " |")
    return "\n".join(lines)


def _describe_measured_text(data: Mapping[str, Any]) -> str:
    name, bracket, rest = str(data.get("measured_on", "held-out text")).rpartition(" (")
    return f"{get_public_data_name(name)}{bracket}{rest}"


def _format_lineage(card: Card) -> str:
    lines = []
    for parent in card.parents:
        license_name = parent.licence or "not stated; ask its authors before you share this"
        note = f", {parent.note}" if parent.note else ""
        weights = f"SHA-256 `{parent.digest}`" if parent.digest else "potstill has not seen its weights"
        lines.append(f"- {parent.role}: `{get_public_name(parent.name)}`{note} (license: {license_name}; {weights})")
    return "\n".join(lines) if lines else "No parent model."


def _format_facts(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {_format_value(value)}" for name, value in facts.items())


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_format_value(v)}" for k, v in value.items())
    return str(value)
