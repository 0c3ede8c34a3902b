"""SmolLM2 aligned with pairs of HH-RLHF harmless-base: DPO, reverse DPO, AlignDistil between the two, and TRL's DPO.

Measured on the same held-out pairs: accuracy of the implied reward, its margin, the KL to the model before training,
and the lengths of the answers that the model writes itself. Beside them stand the accuracies of two rules that need no
training: the shorter answer wins, and the answer that is likelier before training wins. AlignDistil's `plus` is the
model of DPO and `minus` that of reverse DPO. TRL trains on the pairs of DPO, in as many steps or one or two more or
fewer, with the same schedule. A finished run in `--out` is not repeated, and a stopped one of potstill continues.

    POTSTILL_DATA=... python benchmarks/preferences.py --json --out runs --pairs 192     (`--only trl` needs TRL)
"""

import argparse
import gzip
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from setting.document import command_line, document, refuse_on_red
from setting.preferences import FILE, train_trl
from setting.runs import is_finished, select_measures
from setting.samples import sample_answers
from setting.sums import Files

RESTS_ON = [
    "tests/objectives/test_preference.py",
    "tests/stages/align/test_aligndistil.py",
    "tests/stages/align/test_run.py",
]
MEASURES = ("preference_loss", "reward_accuracy", "reward_margin", "reference_kl", "chosen_log_p", "rejected_log_p")
BASELINES = ("likelihood_accuracy", "shorter_accuracy", "chosen_tokens", "rejected_tokens")
TEACHERS = {"dpo": "dpo", "reverse": "dpo:swap=1"}
ARMS = {
    **TEACHERS,
    "adaptive": "aligndistil",
    "constant": "aligndistil:adaptive=0",
    "on-policy": "aligndistil",
}
PEER = "trl"
CONTEXT, BATCH_TOKENS = 512, 1024  # of a prompt with both answers; of a step
MAX_TOKENS = 96  # of an answer that a model writes


def main() -> None:
    """Trains and measures what `--out` lacks, and prints one document."""
    options = parse_arguments()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    files = write_pairs(options)
    needed = set(TEACHERS) if set(options.only) & (set(ARMS) - set(TEACHERS)) else {"dpo"}
    names = [name for name in ARMS if name in needed | set(options.only)]
    figures: dict[str, Any] = {}
    for seed in options.seeds:
        figures |= {f"{name}, seed {seed}": align(name, seed, files, options) for name in names}
        if PEER in options.only:
            figures[f"{PEER}, seed {seed}"] = align_with_trl(seed, files, options)
    met = check_goals(figures, options)
    print(document("preferences", figures, met))


def write_pairs(options: argparse.Namespace) -> Files:
    """The first pairs of the file to measure on, and those behind them to train on."""
    with gzip.open(Path(os.environ["POTSTILL_DATA"]) / FILE, "rt", encoding="utf-8") as file:
        lines = list(file)[: options.held_out + options.pairs]
    files = Files(options.out / f"train-{options.pairs}.jsonl", options.out / f"held_out-{options.held_out}.jsonl")
    options.out.mkdir(parents=True, exist_ok=True)
    files.held_out.write_text("".join(lines[: options.held_out]), encoding="utf-8")
    files.train.write_text("".join(lines[options.held_out :]), encoding="utf-8")
    return files


def align(name: str, seed: int, files: Files, options: argparse.Namespace) -> dict[str, Any]:
    """The measures of one arm before and after training."""
    import potstill
    from potstill.core.card import BEFORE_TRAINING, read_card

    folders = {arm: Path(options.out) / f"{arm}-{options.pairs}-{seed}" for arm in ARMS}
    out = folders[name]
    if not is_finished(out):
        print(f"{name}, seed {seed}", file=sys.stderr)
        potstill.align(
            options.model,
            objective=ARMS[name],
            data=str(files.train),
            eval_data=str(files.held_out),
            documents=options.held_out,
            context=CONTEXT,
            batch_tokens=BATCH_TOKENS,
            on_policy=1.0 if name == "on-policy" else 0.0,
            lr=options.lr,
            seed=seed,
            save_dtype="float32",
            out=out,
            resume=out.exists(),
            plus=None if name in TEACHERS else str(folders["dpo"]),
            minus=None if name in TEACHERS else str(folders["reverse"]),
        )
    card = read_card(out)
    before, after = card["measures"][BEFORE_TRAINING], card["measures"][out.name]
    report = {
        "before": select_measures(before, (*MEASURES, *BASELINES)),
        "after": select_measures(after, (*MEASURES, "likelihood_accuracy")),
        "pairs": card["data"]["preferences"],
        "seconds": card["cost"]["seconds"],
    }
    return report | ({"written": measure_written(out, files, options)} if options.answers else {})


def align_with_trl(seed: int, files: Files, options: argparse.Namespace) -> dict[str, Any]:
    """The measures of SmolLM2 after DPO by TRL, on the pairs of the run `dpo`."""
    import potstill
    from potstill.core.card import read_card

    out = options.out / f"{PEER}-{options.pairs}-{seed}"
    if not (out / "config.json").exists():
        print(f"{PEER}, seed {seed}", file=sys.stderr)
        card = read_card(options.out / f"dpo-{options.pairs}-{seed}")
        train_trl(
            out,
            options.model,
            files.train,
            context=CONTEXT,
            steps=card["cost"]["steps"],
            lr=options.lr,
            seed=seed,
        )
    table = potstill.measure(
        out,
        reference=options.model,
        data=str(files.held_out),
        split="all",
        documents=options.held_out,
        context=CONTEXT,
        speed=False,
    )
    (measures,) = table.values()
    after = [measure.to_dict() for measure in measures]
    report = {"after": select_measures(after, (*MEASURES, "likelihood_accuracy"))}
    return report | ({"written": measure_written(out, files, options)} if options.answers else {})


def measure_written(model: Path, files: Files, options: argparse.Namespace) -> dict[str, float]:
    """The mean tokens of the answers that a model writes to the first held-out prompts, and the share that was cut."""
    from potstill.data.preferences import load_preferences, to_preference

    documents = load_preferences(str(files.held_out)).documents.select(range(options.answers))
    chats = [to_preference(document).prompt for document in documents]
    answers = [group[0] for group in sample_answers(model, chats, samples=1, max_tokens=MAX_TOKENS)]
    cut = sum(not answer.ended for answer in answers) / len(answers)
    return {"tokens": statistics.mean(answer.tokens for answer in answers), "cut": cut}


def check_goals(figures: dict[str, Any], options: argparse.Namespace) -> dict[str, bool]:
    """Whether DPO ranks better than both rules."""
    met = {}
    for seed in options.seeds:
        if (report := figures.get(f"dpo, seed {seed}")) is None:
            continue
        rules = [report["before"][name][0] for name in ("likelihood_accuracy", "shorter_accuracy")]
        met[f"seed {seed}: DPO above both rules"] = report["after"]["reward_accuracy"][0] > max(rules)
    return met


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--answers", type=int, default=40, help="held-out prompts that every model answers; 0: none")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=[*ARMS, PEER], default=[*ARMS, PEER])
    parser.add_argument("--out", type=Path, default=Path("out/preferences"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
