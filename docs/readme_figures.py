"""Writes the measured part of README.md and its picture from docs/demo-measures.json, the measures of one `make demo`.

    make readme

The table, the sentences below it and docs/demo.png contain no other numbers. A measurement in which distillation is not
closer to the teacher than cross-entropy is refused, because README says that it is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES, format_measure
from potstill.evaluate.charts.style import ACCENT, DPI, GRAY, INK, LIGHT_INK, TEXT, add_title, style_panel

ROOT = Path(__file__).parents[1]
MEASUREMENT, README, PICTURE = ROOT / "docs/demo-measures.json", ROOT / "README.md", ROOT / "docs/demo.png"
START, END = "<!-- measures: `make readme` writes this part -->\n", "<!-- end of measures -->\n"
BASELINE, BEST = "cross-entropy", "distilled"
LABELS = {
    "teacher": "teacher (4-bit GGUF, dequantized)",
    "pruned": "pruned",
    BASELINE: "pruned, then cross-entropy",
    BEST: "pruned, then distilled",
}
COLUMNS = ("teacher_kl", "teacher_agreement", "bits_per_byte", "parameters", "bfloat16_bytes")
PANELS = ("teacher_kl", "teacher_agreement")
FACTORS = {"teacher_agreement": (100, 1, "points of agreement"), "teacher_kl": (1, 2, "nats of KL")}
SIZE = (5.4, 6.2)  # inches: narrow, so that its letters stay readable on a phone

Models = Mapping[str, Mapping[str, Measure]]


def read_models(measurement: Mapping[str, Any]) -> Models:
    """The measures of the four models, by model and name."""
    return {
        model: {measure["name"]: Measure(**measure) for measure in measurement["models"][model]} for model in LABELS
    }


def build_table(models: Models) -> str:
    """The table of the four models, in Markdown; the student that is closer to the teacher stands in bold."""
    rows = [["", *(MEASURES[name].column for name in COLUMNS)], ["---"] * (len(COLUMNS) + 1)]
    for model, label in LABELS.items():
        cells = [format_measure(models[model].get(name)) for name in COLUMNS]
        if model == BEST:
            cells[:2] = [f"**{value}** {interval}" for value, interval in (cell.split(" ", 1) for cell in cells[:2])]
        rows.append([label, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def format_gain(entry: Mapping[str, Any], factor: float, decimals: int) -> str:
    """The gain of distillation over cross-entropy with its interval: `0.20 [0.18, 0.22]`."""
    sign = 1 if MEASURES[entry["name"]].better == "lower" else -1
    values = [sign * factor * entry[end] for end in ("value", "low", "high")]
    value, low, high = (f"{number:.{decimals}f}" for number in (values[0], *sorted(values[1:])))
    return f"{value} [{low}, {high}]"


def find_gains(measurement: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The paired differences of cross-entropy minus distillation, by measure.

    Raises: ValueError if an interval of KL or agreement does not exclude zero in favor of distillation.
    """
    gains = {e["name"]: e for e in measurement["paired"] if (e["a"], e["b"]) == (BASELINE, BEST)}
    if gains["teacher_kl"]["low"] <= 0 or gains["teacher_agreement"]["high"] >= 0:
        raise ValueError("distillation is not closer to the teacher than cross-entropy here; README says that it is")
    return gains


def write_verdict(gain: Mapping[str, Any]) -> str:
    """What the paired difference in bits per byte says."""
    value, low, high = gain["value"], gain["low"], gain["high"]
    if low > 0:
        return f"It also needs {value:.3f} [{low:.3f}, {high:.3f}] bits per byte less."
    if high < 0:
        return f"It needs {-value:.3f} [{-high:.3f}, {-low:.3f}] bits per byte more."
    return f"In bits per byte the two do not differ measurably: {value:.3f} [{low:.3f}, {high:.3f}]."


def write_sentences(measurement: Mapping[str, Any], models: Models) -> str:
    """The sentences below the table."""
    gains = find_gains(measurement)
    closer = " and ".join(f"{format_gain(gains[name], *FACTORS[name][:2])} {FACTORS[name][2]}" for name in PANELS)
    data = measurement["data"]
    return (
        f"Brackets hold 95 % intervals over {data['documents']} held-out documents. Paired by document, distillation "
        f"is {closer} closer to the teacher than cross-entropy. {write_verdict(gains['bits_per_byte'])}"
        f"{write_speeds(models)}\n"
    )


def write_speeds(models: Models) -> str:
    """The speeds of the pruned model and the teacher; nothing if they were not measured."""
    teacher, student = models["teacher"], models["pruned"]
    speeds = ("prefill_tokens_per_second", "decode_tokens_per_second")
    if not all(name in model for model in (teacher, student) for name in speeds):
        return ""
    reads, writes = ([MEASURES[name].format(model[name].value) for model in (student, teacher)] for name in speeds)
    return (
        f" In Hugging Face's `generate` the pruned model reads {reads[0]} tokens/s and writes {writes[0]}; the teacher "
        f"reads {reads[1]} and writes {writes[1]}."
    )


def write_part(measurement: Mapping[str, Any]) -> str:
    """All that stands between the two comments in README.md."""
    models = read_models(measurement)
    return f"\n{build_table(models)}\n{write_sentences(measurement, models)}\n"


def draw_picture(models: Models, path: Path) -> None:
    """Write `path`, a PNG: for each of KL and agreement the three students beside the teacher, with intervals."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    size, share = (
        models[BEST]["bfloat16_bytes"],
        models[BEST]["parameters"].value / models["teacher"]["parameters"].value,
    )
    add_title(figure, "Trained on the same text, the distilled\nstudent is closer to its teacher")
    for panel, name in zip(figure.subplots(len(PANELS), 1), PANELS, strict=True):
        draw_panel(panel, {model: measures[name] for model, measures in models.items()})
    caption = (
        f"All three students: {share:.0%} of the parameters, {MEASURES[size.name].format(size.value)} MiB in bf16.\n"
    )
    figure.supxlabel(
        f"{caption}Bars: 95 % intervals over documents.", x=0.012, ha="left", fontsize=TEXT, color=LIGHT_INK
    )
    figure.savefig(path, dpi=DPI)


def draw_panel(panel: Axes, measures: Mapping[str, Measure]) -> None:
    """A row for each student: its value with its interval, and the distance to the teacher's line."""
    info, teacher = MEASURES[measures["teacher"].name], measures["teacher"].value
    style_panel(panel)
    panel.grid(axis="y", visible=False)
    panel.spines["left"].set_visible(False)
    panel.axvline(teacher, color=INK, linewidth=1.5, linestyle="--")
    students = [model for model in LABELS if model != "teacher"]
    for row, model in enumerate(students):
        measure, color = measures[model], ACCENT if model == BEST else GRAY
        panel.hlines(row, teacher, measure.value, color=color, linewidth=7, alpha=0.35)
        panel.hlines(row, measure.low, measure.high, color=color, linewidth=3)
        panel.plot(measure.value, row, "o", ms=10, color=color)
        style: dict[str, Any] = {"fontweight": "bold"} if model == BEST else {}
        panel.annotate(
            f"{info.format(measure.value)}",
            (measure.value, row),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=TEXT + 1,
            color=INK if model == BEST else LIGHT_INK,
            **style,
        )
    panel.set_yticks(range(len(students)), ["pruned", "cross-entropy", "distilled"], fontsize=TEXT + 2, color=INK)
    panel.set_ylim(len(students) - 0.6, -0.75)
    panel.set_xlim(*get_limits([measure.value for measure in measures.values()]))
    panel.annotate(
        "teacher", (teacher, -0.75), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=TEXT, color=INK
    )
    panel.set_xlabel(f"{info.title},\n{info.better} is better", fontsize=TEXT, color=INK)


def get_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis with room for the numbers at both ends."""
    margin = 0.1 * (max(values) - min(values))
    return min(values) - margin, max(values) + margin


def replace_part(start: str, part: str, end: str) -> None:
    """Writes `part` between two comments of README.md."""
    before, _, rest = README.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    README.write_text(f"{before}{start}{part}{end}{after}", encoding="utf-8")


def main() -> None:
    """Rewrites the part of README.md between its two comments, and the picture."""
    measurement = json.loads(MEASUREMENT.read_text(encoding="utf-8"))
    replace_part(START, write_part(measurement), END)
    draw_picture(read_models(measurement), PICTURE)


if __name__ == "__main__":
    main()
