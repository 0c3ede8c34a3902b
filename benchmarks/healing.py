"""SmolLM2 converted and healed: by distillation from the original, beside as many tokens of cross-entropy.

Each conversion starts from the same weights. Distillation trains 0.5 cross-entropy + 0.5 forward KL to the original,
and cross-entropy alone trains without a teacher; both get `--tokens` tokens of the same text. Terms of a method, such
as the balance of experts, are in both. Measured are held-out bits per byte, KL and agreement, before and after, and the
speed. `frontier.html` and `frontier.png` in `--out` show all models. Finished runs in `--out` are not repeated.

    python benchmarks/healing.py --json --out runs --tokens 300k
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from setting.document import command_line, document, refuse_on_red
from setting.runs import is_finished, select_measures

RESTS_ON = ["tests/stages/test_convert.py", "tests/transforms"]
MEASURES = ("bits_per_byte", "teacher_kl", "teacher_agreement", "decode_tokens_per_second")


class Case(NamedTuple):
    """A conversion, the further terms of its loss, and its learning rate."""

    to: str
    terms: str = ""
    learning_rate: float = 5e-4


CASES = {
    "gated-deltanet": Case("deltanet:gated=true,attention_every=4"),
    "ternary": Case("ternary", "", 1e-3),
    "depths": Case("depths:bias=0.05", "+1*load:target=0.26", 2e-4),  # 70 % of the FLOPs
    "experts": Case("experts:experts=4", "+0.01*balance", 1e-4),
    "elastic": Case("elastic", "", 2e-4),
}
OBJECTIVES = {"distilled": "0.5*cross_entropy+0.5*forward_kl{terms}", "cross-entropy": "1*cross_entropy{terms}"}


def main() -> None:
    """Converts, heals and measures what `--out` lacks, and prints one document."""
    options = parse_arguments()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    figures = {name: run_case(name, CASES[name], options) for name in options.only}
    met = check_goals(figures)
    print(document("healing", {**figures, "measured": measure_all(options)}, met))


def run_case(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measures of a converted model before and after both kinds of training."""
    import potstill
    from potstill.core.card import BEFORE_TRAINING, read_card

    converted = options.out / f"{name}-converted"
    if not (converted / "card.json").exists():
        potstill.convert(options.model, to=case.to, data=options.data, out=converted, overwrite=True)
    report: dict[str, Any] = {"conversion": case.to, "details": read_card(converted)["details"]}
    for kind, objective in OBJECTIVES.items():
        out = options.out / f"{name}-{kind}"
        if not is_finished(out):
            print(f"{name}, {kind}", file=sys.stderr)
            potstill.distill(
                teacher=options.model,
                student=converted,
                objective=objective.format(terms=case.terms),
                data=options.data,
                tokens=options.tokens,
                batch_tokens=options.batch_tokens,
                micro_tokens=options.batch_tokens,
                lr=case.learning_rate,
                documents=options.documents,
                out=out,
                resume=out.exists(),
            )
        card = read_card(out)
        report["before"] = select_measures(card["measures"][BEFORE_TRAINING], MEASURES)
        report["original"] = select_measures(card["measures"]["teacher"], MEASURES)
        report[kind] = {**select_measures(card["measures"][out.name], MEASURES), "seconds": card["cost"]["seconds"]}
    return report


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Quality and speed of every model, sizes of elastic ones too, on one text; draws the frontier."""
    import potstill

    folders = [options.out / f"{name}-{kind}" for name in options.only for kind in ("converted", *OBJECTIVES)]
    models = [options.model, *(name for folder in folders for name in list_sizes(folder))]
    potstill.measure(
        *models,
        teacher=options.model,
        data=options.data,
        documents=options.documents,
        out=options.out / "measures.json",
    )
    potstill.frontier(
        options.out / "measures.json", out=options.out / "frontier.html", title="Architectures of SmolLM2-135M"
    )
    measures = json.loads((options.out / "measures.json").read_text())["models"]
    return {name: select_measures(values, MEASURES) for name, values in measures.items()}


def list_sizes(folder: Path) -> list[str]:
    """The names of a model's sizes; the folder itself if it has one size alone."""
    from potstill.core.elastic import name_size, read_sizes
    from potstill.models.spec import read_model_spec

    sizes = read_sizes(read_model_spec(folder).blueprint)
    return [name_size(str(folder), size.share) for size in sizes] or [str(folder)]


def check_goals(figures: dict[str, Any]) -> dict[str, bool]:
    """Whether healing lowers bits per byte, and distillation is nearer to the original than cross-entropy."""
    met = {}
    for name, report in figures.items():
        after, plain, before = report["distilled"], report["cross-entropy"], report["before"]
        met[f"{name}: bits per byte fall"] = after["bits_per_byte"][0] < before["bits_per_byte"][0]
        met[f"{name}: KL below that of cross-entropy"] = after["teacher_kl"][0] < plain["teacher_kl"][0]
    return met


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    from potstill.core.counts import parse_count

    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="docstrings")
    parser.add_argument("--tokens", type=parse_count, default=300_000)
    parser.add_argument("--batch-tokens", type=parse_count, default=1024, help="tokens of an optimizer step")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("out/healing"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
