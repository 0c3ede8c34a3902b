"""The results of an arena: numbers by arm, comparisons of arms, a README and a chart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import write_text
from potstill.core.card import read_card
from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES, MEBIBYTE, TABLE_QUALITIES
from potstill.evaluate.charts.dot_plot import draw_dots
from potstill.evaluate.measures import ModelEvaluation
from potstill.evaluate.significance import INCONCLUSIVE, compare_methods
from potstill.stages.arena.runs import CHART_FILE, README_FILE, ArenaRun
from potstill.stages.console import attempt, get_command

REFERENCE_ARM = "cross_entropy"  # every arm is also compared with this one, if it takes part
COST_TITLES = {"tokens": "tokens", "seconds": "seconds", "tokens_per_second": "tokens/s", "peak_memory": "peak MiB"}
TITLES = {name: MEASURES[name].column for name in TABLE_QUALITIES} | COST_TITLES
VERDICT_RULE = (
    "An arm is better or worse only where the 95 % interval of the difference (paired bootstrap over the held-out "
    "documents, averaged over the seeds) leaves out 0 and the difference has one sign in every seed."
)


def publish(
    out: Path,
    runs: Sequence[ArenaRun],
    results: Mapping[str, ModelEvaluation],
    baselines: Mapping[str, ModelEvaluation],
    *,
    budget: str,
) -> dict[str, Any]:
    """Write the README and the chart into `out`; returns the numbers as plain data."""
    arms = [
        summarize_arm(name, [arena_run for arena_run in runs if arena_run.arm == name], results)
        for name in list_arm_names(runs)
    ]
    summary = {
        "arms": arms,
        "baselines": {name: get_quality_values(baseline) for name, baseline in baselines.items()},
        "paired": compare_arms(runs, results),
    }
    seeds = len(runs) // len(arms)
    caption = (
        f"Filled: the mean of {seeds} seeds; hollow: each seed; bars: 95 % intervals over documents. "
        f"Gray: for comparison. Budget: {budget} for each."
    )
    write_text(out / README_FILE, render_page(summary, title=out.name, caption=caption))
    failures: dict[str, str] = {}
    measures = {arm["arm"]: collect_measures(arm) for arm in arms}
    baseline_measures = {name: {m.name: m for m in baseline.measures} for name, baseline in baselines.items()}
    title = f"{out.name}: {len(arms)} objectives, {seeds} seeds"
    attempt(
        "chart",
        lambda: draw_dots(measures, out / CHART_FILE, baselines=baseline_measures, title=title, caption=caption),
        None,
        failures,
    )
    return {**summary, "failures": failures} if failures else summary


def list_arm_names(runs: Sequence[ArenaRun]) -> list[str]:
    """The names of the arms, each once, in order."""
    return list(dict.fromkeys(arena_run.arm for arena_run in runs))


def summarize_arm(name: str, runs: Sequence[ArenaRun], results: Mapping[str, ModelEvaluation]) -> dict[str, Any]:
    """The measures and costs of each seed of an arm, and the mean and range of each number over the seeds."""
    costs = [{key: float(read_card(arena_run.folder)["cost"][key]) for key in COST_TITLES} for arena_run in runs]
    run_results = [results[str(arena_run.folder)] for arena_run in runs]
    values = [get_quality_values(result) | cost for result, cost in zip(run_results, costs, strict=True)]
    seeds = [
        {
            "seed": arena_run.seed,
            "folder": arena_run.folder.name,
            "measures": {measure.name: measure.to_dict() for measure in result.measures},
            "cost": cost,
        }
        for arena_run, result, cost in zip(runs, run_results, costs, strict=True)
    ]
    means = {
        key: summarize_seeds([result[key] for result in values])
        for key in TITLES
        if all(key in result for result in values)
    }
    return {"arm": name, "means": means, "seeds": seeds}


def summarize_seeds(values: Sequence[float]) -> dict[str, float]:
    """The mean, the lowest and the highest value of the seeds."""
    return {"value": sum(values) / len(values), "low": min(values), "high": max(values)}


def get_quality_values(result: ModelEvaluation) -> dict[str, float]:
    """The values of a model's quality measures, by name."""
    return {measure.name: measure.value for measure in result.measures if measure.name in TABLE_QUALITIES}


def collect_measures(arm: Mapping[str, Any]) -> dict[str, list[Measure]]:
    """The quality measures that every seed of an arm has, by name."""
    common_names = [name for name in TABLE_QUALITIES if all(name in seed["measures"] for seed in arm["seeds"])]
    return {name: [Measure(**seed["measures"][name]) for seed in arm["seeds"]] for name in common_names}


def compare_arms(runs: Sequence[ArenaRun], results: Mapping[str, ModelEvaluation]) -> list[dict[str, Any]]:
    """Compare every arm with the first one, and with cross-entropy if it takes part."""
    names = list_arm_names(runs)
    references = list(dict.fromkeys([names[0], *(name for name in names if name == REFERENCE_ARM)]))
    scores = {name: [results[str(arena_run.folder)] for arena_run in runs if arena_run.arm == name] for name in names}
    arm_pairs = [(a, b) for b in references for a in names if a not in references[: references.index(b) + 1]]
    return [
        {"a": a, "b": b, **comparison.to_dict()}
        for a, b in arm_pairs
        for comparison in compare_methods(scores[a], scores[b])
    ]


def make_ranking_table(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of the ranking table as text by column: teacher and initial student first, then the arms."""
    rows = [
        {"arm": name} | _format_cells({k: {"value": v} for k, v in values.items()})
        for name, values in summary["baselines"].items()
    ]
    rows += [{"arm": arm["arm"]} | _format_cells(arm["means"]) for arm in summary["arms"]]
    columns = ["arm", *(title for title in TITLES.values() if any(title in row for row in rows))]
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def make_comparison_table(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of the table of comparisons, as text by column."""
    return [
        {
            "comparison": f"{comparison['a']} against {comparison['b']}",
            "measure": TITLES[comparison["name"]],
            "difference": _format_difference(comparison),
            "each seed": ", ".join(f"{seed['value']:+.4f}" for seed in comparison["seeds"]),
            "verdict": f"{comparison['verdict']}: {comparison['why']}"
            if comparison["verdict"] == INCONCLUSIVE
            else f"{comparison['verdict']} {comparison['why']}",
        }
        for comparison in summary["paired"]
    ]


def render_page(summary: Mapping[str, Any], *, title: str, caption: str) -> str:
    """The text of the arena's README.md."""
    parts = [f"# {title}", f"![{caption}]({CHART_FILE})", caption, render_table(make_ranking_table(summary))]
    parts += ["Brackets give the lowest and the highest seed."]
    if comparisons := make_comparison_table(summary):
        parts += ["## Who is better", VERDICT_RULE, render_table(comparisons)]
    return "\n\n".join([*parts, f"## Made by\n\n```\n{get_command()}\n```", "`arena.json` holds the same data."]) + "\n"


def render_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of these rows."""
    lines = [" | ".join(rows[0]), "|".join(["---"] * len(rows[0])), *(" | ".join(row.values()) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def _format_cells(values: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    return {TITLES[name]: _format_cell(name, statistics) for name, statistics in values.items()}


def _format_cell(name: str, statistics: Mapping[str, float]) -> str:
    """A mean; for a quality measure followed by its range over the seeds in brackets."""
    if name in COST_TITLES:
        return f"{statistics['value'] / (MEBIBYTE if name == 'peak_memory' else 1):,.0f}"
    texts = {key: MEASURES[name].format(value, extra_decimals=1) for key, value in statistics.items()}
    if texts.get("low") == texts.get("high"):
        return texts["value"]
    return f"{texts['value']} [{texts['low']}, {texts['high']}]"


def _format_difference(comparison: Mapping[str, Any]) -> str:
    if comparison["low"] is None:
        return f"{comparison['value']:+.4f}"
    return f"{comparison['value']:+.4f} [{comparison['low']:+.4f}, {comparison['high']:+.4f}]"
