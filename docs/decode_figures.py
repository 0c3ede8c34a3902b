"""Writes README.md's table of decoding speeds and its picture from docs/decode-measures.json.

Measure, then write:

    python benchmarks/decode.py --json > docs/decode-measures.json
    make readme
"""

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from readme_figures import ROOT, replace_part

from potstill.evaluate.charts.style import ACCENT, DPI, GRAY, INK, LIGHT_INK, TEXT, add_title, style_panel

MEASUREMENT, PICTURE = ROOT / "docs/decode-measures.json", ROOT / "docs/decode.png"
START, END = "<!-- decoding: `make readme` writes this part -->\n", "<!-- end of decoding -->\n"
BASELINE = "Hugging Face bf16"
SETS = {"vicuna_bench": "Vicuna", "mt_bench": "MT-bench"}
SIZE = (5.4, 4.6)  # inches: narrow, so that its letters stay readable on a phone

Rates = Mapping[str, Mapping[str, float]]


def read_rates() -> Rates:
    """Tokens per second by set of prompts and side."""
    rates: Rates = json.loads(MEASUREMENT.read_text(encoding="utf-8"))["figures"]["tokens per second"]
    return rates


def list_sides(rates: Rates) -> list[str]:
    """The sides in bf16, int8 and 4 bits, the fastest on average first."""
    sides = [side for side in next(iter(rates.values())) if "float32" not in side]
    return sorted(sides, key=lambda side: -sum(rates[name][side] for name in SETS))


def write_part(rates: Rates) -> str:
    """All that stands between the two comments in README.md."""
    rows = [f"| tokens/s | {' | '.join(SETS.values())} | times Hugging Face's |", "|---|---|---|---|"]
    for side in list_sides(rates):
        speeds = " | ".join(f"{rates[name][side]:.0f}" for name in SETS)
        factors = [f"{rates[name][side] / rates[name][BASELINE]:.1f}" for name in SETS]
        rows.append(f"| {side} | {speeds} | {', '.join(factors)} |")
    return "\n" + "\n".join(rows) + "\n\n"


def draw_picture(rates: Rates, path: Path) -> None:
    """Write `path`, a PNG: a bar for each side and set of prompts."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    add_title(figure, "SmolLM2-135M writes on two cores")
    panel, sides = figure.subplots(), list_sides(rates)
    style_panel(panel)
    panel.grid(axis="y", visible=False)
    for row, side in enumerate(sides):
        color = ACCENT if side.startswith("potstill") else GRAY
        for place, name in enumerate(SETS):
            y, rate = row + 0.4 * place - 0.2, rates[name][side]
            panel.barh(y, rate, height=0.36, color=color, alpha=1.0 - 0.4 * place)
            panel.annotate(
                f"{rate:.0f}",
                (rate, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=TEXT - 1,
                color=INK,
            )
    panel.set_yticks(range(len(sides)), sides, fontsize=TEXT, color=INK)
    panel.set_ylim(len(sides) - 0.5, -0.5)
    panel.set_xlim(0, 1.12 * max(rate for name in SETS for rate in rates[name].values()))
    panel.set_xlabel("tokens per second", fontsize=TEXT, color=INK)
    upper, lower = SETS.values()
    figure.supxlabel(f"Upper bar: {upper} prompts; lower: {lower}.", x=0.012, ha="left", fontsize=TEXT, color=LIGHT_INK)
    figure.savefig(path, dpi=DPI)


def main() -> None:
    """Rewrites the part of README.md between its two comments, and the picture."""
    rates = read_rates()
    replace_part(START, write_part(rates), END)
    draw_picture(rates, PICTURE)


if __name__ == "__main__":
    main()
