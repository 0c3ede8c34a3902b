"""What came out of an arena: numbers by arm, who is better than whom, a page and a picture that say so."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.artefact import read_card, write_text
from potstill.core.types import Measure
from potstill.evaluate.contest import EQUAL, contests
from potstill.evaluate.dots import draw_dots
from potstill.evaluate.measure import Judged
from potstill.pipeline.bouts import CHART, PAGE, Bout
from potstill.pipeline.stage import command

REFERENCE = "cross_entropy"  # every arm is compared with it too, where it takes part
COSTS = ("tokens", "seconds", "tokens_per_second", "peak_memory")
COLUMNS = {
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "teacher_kl": ("KL to teacher (nats)", "{:.4f}"),
    "teacher_agreement": ("agreement", "{:.4f}"),
    "rouge_l": ("ROUGE-L", "{:.2f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "seconds": ("seconds", "{:,.0f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "peak_memory": ("peak MiB", "{:,.0f}"),
}
QUALITIES = tuple(name for name in COLUMNS if name not in COSTS)
RULE = (
    "An arm is better or worse only where the 95 % interval of the difference (paired bootstrap over the held-out "
    "documents, averaged over the seeds) leaves out 0 and the difference has one sign in every seed."
)


def publish(
    out: Path, bouts: Sequence[Bout], judged: Mapping[str, Judged], baselines: Mapping[str, Judged], *, budget: str
) -> dict[str, Any]:
    """Writes the page and the picture into `out`; the numbers, as plain data."""
    arms = [arm_of(name, [b for b in bouts if b.arm == name], judged) for name in names_of(bouts)]
    found = {
        "arms": arms,
        "baselines": {name: qualities_of(one) for name, one in baselines.items()},
        "paired": paired(bouts, judged),
    }
    seeds = len(bouts) // len(arms)
    caption = f"Filled: the mean of {seeds} seeds; hollow: each seed. Budget: {budget} for each."
    draw_dots({arm["arm"]: measures_of(arm) for arm in arms}, out / CHART, title=out.name, caption=caption)
    write_text(out / PAGE, page(found, title=out.name, caption=caption))
    return found


def names_of(bouts: Sequence[Bout]) -> list[str]:
    """The arms, each once, in order."""
    return list(dict.fromkeys(bout.arm for bout in bouts))


def arm_of(name: str, bouts: Sequence[Bout], judged: Mapping[str, Judged]) -> dict[str, Any]:
    """An arm: what each seed has measured and cost, and of each number the mean over the seeds with its range."""
    costs = [{key: float(read_card(bout.folder)["cost"][key]) for key in COSTS} for bout in bouts]
    made = [judged[str(bout.folder)] for bout in bouts]
    values = [qualities_of(one) | cost for one, cost in zip(made, costs, strict=True)]
    seeds = [
        {
            "seed": bout.seed,
            "folder": bout.folder.name,
            "measures": {m.name: m.to_dict() for m in one.measures},
            "cost": cost,
        }
        for bout, one, cost in zip(bouts, made, costs, strict=True)
    ]
    means = {key: spread([one[key] for one in values]) for key in COLUMNS if all(key in one for one in values)}
    return {"arm": name, "means": means, "seeds": seeds}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The mean of the seeds, and the lowest and the highest of them."""
    return {"value": sum(values) / len(values), "low": min(values), "high": max(values)}


def qualities_of(judged: Judged) -> dict[str, float]:
    """What a model reached, by measure."""
    return {m.name: m.value for m in judged.measures if m.name in QUALITIES}


def measures_of(arm: Mapping[str, Any]) -> dict[str, list[Measure]]:
    """The measures of every seed of an arm, by name."""
    shared = [name for name in QUALITIES if all(name in seed["measures"] for seed in arm["seeds"])]
    return {name: [Measure(**seed["measures"][name]) for seed in arm["seeds"]] for name in shared}


def paired(bouts: Sequence[Bout], judged: Mapping[str, Judged]) -> list[dict[str, Any]]:
    """Every arm against the first one, and against cross-entropy where that takes part."""
    names = names_of(bouts)
    against = list(dict.fromkeys([names[0], *(name for name in names if name == REFERENCE)]))
    scores = {name: [judged[str(bout.folder)] for bout in bouts if bout.arm == name] for name in names}
    couples = [(a, b) for b in against for a in names if a not in against[: against.index(b) + 1]]
    return [{"a": a, "b": b, **one.to_dict()} for a, b in couples for one in contests(scores[a], scores[b])]


def ranking(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of arms below the teacher and the student that all began with, as text by column."""
    rows = [
        {"arm": name} | _cells({k: {"value": v} for k, v in one.items()}) for name, one in found["baselines"].items()
    ]
    rows += [{"arm": arm["arm"]} | _cells(arm["means"]) for arm in found["arms"]]
    columns = ["arm", *(title for title, _ in COLUMNS.values() if any(title in row for row in rows))]
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def differences(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of comparisons, as text by column."""
    return [
        {
            "comparison": f"{one['a']} against {one['b']}",
            "measure": COLUMNS[one["name"]][0],
            "difference": _difference(one),
            "each seed": ", ".join(f"{seed['value']:+.4f}" for seed in one["seeds"]),
            "verdict": f"{one['verdict']}: {one['why']}"
            if one["verdict"] == EQUAL
            else f"{one['verdict']} {one['why']}",
        }
        for one in found["paired"]
    ]


def page(found: Mapping[str, Any], *, title: str, caption: str) -> str:
    """README.md of an arena."""
    parts = [f"# {title}", f"![{caption}]({CHART})", caption, markdown(ranking(found))]
    parts += ["In brackets: the lowest and the highest seed."]
    if compared := differences(found):
        parts += ["## Who is better", RULE, markdown(compared)]
    return (
        "\n\n".join([*parts, f"## Made by\n\n```\n{command()}\n```", "`arena.json` says all of this to machines."])
        + "\n"
    )


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of text as a table."""
    lines = [" | ".join(rows[0]), "|".join(["---"] * len(rows[0])), *(" | ".join(row.values()) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def _cells(values: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    return {COLUMNS[name][0]: _cell(name, one) for name, one in values.items()}


def _cell(name: str, one: Mapping[str, float]) -> str:
    """A mean, of a quality with its range in brackets."""
    unit = 2**20 if name == "peak_memory" else 1
    shown = {key: COLUMNS[name][1].format(value / unit) for key, value in one.items()}
    if name in COSTS or shown.get("low") == shown.get("high"):
        return shown["value"]
    return f"{shown['value']} [{shown['low']}, {shown['high']}]"


def _difference(one: Mapping[str, Any]) -> str:
    if one["low"] is None:
        return f"{one['value']:+.4f}"
    return f"{one['value']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"
