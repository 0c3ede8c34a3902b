"""Sums asked in English, French, Spanish and German, by a model that mixes its languages up: GRPO under three rewards.

The cold start is SmolLM2 after cross-entropy on worked answers, of which 6 in 10 think in another language than the
question's, mostly in English. English thinking is right in 9 of 10 answers there, all other in 4 of 10, so English is
the easier language. GRPO then trains under accuracy alone, under 0.9 accuracy + 0.1 language (`slc_rl`), and behind
M-Thinker's gate. Measured on held-out sums of every language, 4 samples each at temperature 1: right answers, answers
in the language of the question, and answers with both.

CM-Align's pairs are drawn from the cold start: how often the chosen answer is right and the rejected one wrong, where
the pivot is the most consistent English answer, and where it is the first one. DPO then trains on each of both sets. A
finished run in `--out` is not repeated, and a stopped one continues.

    python benchmarks/sums_languages.py --json --out runs --steps 12
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import write_rows
from setting.document import command_line, document, refuse_on_red
from setting.runs import is_finished, train_on_text
from setting.samples import Answer, sample_answers
from setting.sums import QUESTIONS, SAMPLES, Files, train_grpo, write_sums
from setting.worked_sums import make_worked_sums

RESTS_ON = [
    "tests/train/rewards/test_m_thinker.py",
    "tests/train/rollouts/test_grouped.py",
    "tests/evaluate/test_consistency.py",
]
REWARDS = {"accuracy": "accuracy", "slc_rl": "slc_rl", "m_thinker": "m_thinker:minimum=16"}
MAX_TOKENS, CONTEXT = 48, 448
MEASURED_SAMPLES = 4
PIVOTS = ("consistent", "first")
Row = Mapping[str, Any]


def main() -> None:
    """Trains and measures what `--out` lacks, and prints one document."""
    options = parse_arguments()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    files = write_sums(options.out / "sums", languages=QUESTIONS)
    start = train_cold_start(files, options)
    figures: dict[str, Any] = {"cold start": measure(start, files, options)}
    for seed in options.seeds:
        for name in options.only:
            figures[f"{name}, seed {seed}"] = measure(train(name, seed, start, files, options), files, options)
    figures["pairs"] = {pivot: select_pairs(pivot, start, files, options) for pivot in options.pivots}
    for pivot in options.pivots:
        figures[f"dpo, {pivot} pivot"] = measure(train_dpo(pivot, start, options), files, options)
    print(document("sums_languages", figures, check_goals(figures, options)))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON Lines."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_cold_start(files: Files, options: argparse.Namespace) -> Path:
    """SmolLM2 after cross-entropy on `--cold-start` worked answers."""
    rows = read_rows(files.train)
    repeated = (rows * -(-options.cold_start // len(rows)))[: options.cold_start]
    data = options.out / "worked.jsonl"
    write_rows(data, make_worked_sums(repeated))
    out: Path = options.out / "cold-start"
    train_on_text(
        out,
        teacher=options.model,
        student=options.model,
        data=str(data),
        epochs=1,
        context=128,
        batch_tokens=1024,
        lr=options.cold_lr,
        documents=10,
    )
    return out


def train(name: str, seed: int, start: Path, files: Files, options: argparse.Namespace) -> Path:
    """The cold start after GRPO under a reward."""
    out: Path = options.out / f"{name}-{options.steps}-{seed}"
    train_grpo(
        out,
        start,
        files,
        objective="grpo",
        reward=REWARDS[name],
        context=CONTEXT,
        steps=options.steps,
        documents=4,  # `measure` measures more
        max_tokens=MAX_TOKENS,
        lr=options.lr,
        seed=seed,
    )
    return out


def measure(model: Path, files: Files, options: argparse.Namespace) -> dict[str, Any]:
    """Shares of right and of consistent samples of held-out sums, over all and by language."""
    report = model / "answers.json"
    rows = [row for row in read_rows(files.held_out) if row["id"] in list_ids(files.held_out, options.held_out)]
    if not report.exists():
        chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        groups = sample_answers(model, chats, samples=MEASURED_SAMPLES, max_tokens=MAX_TOKENS)
        report.write_text(json.dumps(groups, ensure_ascii=False))
    answers = [[Answer(*answer) for answer in group] for group in json.loads(report.read_text())]
    figures = {"all": score(rows, answers)}
    for language in QUESTIONS:
        numbers = [n for n, row in enumerate(rows) if row["language"] == language]
        figures[language] = score([rows[n] for n in numbers], [answers[n] for n in numbers])
    return figures


def list_ids(file: Path, count: int) -> list[str]:
    """The first `count` sums of a file."""
    return list(dict.fromkeys(row["id"] for row in read_rows(file)))[:count]


def score(rows: Sequence[Row], groups: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """The shares of samples that are right, that are in the language of the question, that are both, and in English."""
    from potstill.train.rewards.accuracy import Accuracy
    from potstill.train.rewards.base import Completion
    from potstill.train.rewards.language import Language

    completions = [
        Completion(row["prompt"], answer.text, row, ended=answer.ended)
        for row, group in zip(rows, groups, strict=True)
        for answer in group
    ]
    right, consistent = Accuracy()(completions), Language()(completions)
    english = Language()([completion._replace(row={"language": "en"}) for completion in completions])
    both = [a * b for a, b in zip(right, consistent, strict=True)]
    values = {"right": right, "consistent": consistent, "both": both, "english": english}
    return {name: sum(shares) / len(completions) for name, shares in values.items()}


def select_pairs(pivot: str, start: Path, files: Files, options: argparse.Namespace) -> dict[str, Any]:
    """How many of CM-Align's pairs have a right chosen and a wrong rejected answer."""
    import potstill
    from potstill.core.card import read_card

    data = options.out / "questions.jsonl"
    ids = list_ids(files.train, options.pair_sums)
    write_rows(data, [row for row in read_rows(files.train) if row["id"] in ids])
    out = options.out / f"pairs-{pivot}"
    if not (out / "card.json").exists():
        potstill.generate(
            str(start),
            data=str(data),
            select="prefer",
            pivot_answer=pivot,
            samples=SAMPLES,
            temperature=1.0,
            max_tokens=MAX_TOKENS,
            out=out,
        )
    details = read_card(out)["details"]
    return {**details, "precision": details["right_pairs"] / details["checked_pairs"]}


def train_dpo(pivot: str, start: Path, options: argparse.Namespace) -> Path:
    """The cold start after DPO on the pairs of a pivot."""
    import potstill

    out: Path = options.out / f"dpo-{pivot}"
    if not is_finished(out):
        potstill.align(
            str(start),
            objective="dpo:nll=0.2",
            data=str(options.out / f"pairs-{pivot}"),
            context=CONTEXT,
            batch_tokens=1024,
            lr=options.dpo_lr,
            epochs=2,
            save_dtype="float32",
            out=out,
            resume=out.exists(),
        )
    return out


def check_goals(figures: Mapping[str, Any], options: argparse.Namespace) -> dict[str, bool]:
    """Whether the gate keeps the language and accuracy alone loses it, and whether consistent pivots are better."""
    met, start = {}, figures["cold start"]["all"]
    for seed in options.seeds if {"accuracy", "m_thinker"} <= set(options.only) else ():
        runs = {name: figures[f"{name}, seed {seed}"]["all"] for name in options.only}
        best = max(run["both"] for run in runs.values())
        met[f"seed {seed}: accuracy alone lowers consistency"] = runs["accuracy"]["consistent"] < start["consistent"]
        met[f"seed {seed}: behind the gate most are both"] = runs["m_thinker"]["both"] == best
    pairs = figures["pairs"]
    if set(PIVOTS) <= set(pairs):
        better = pairs["consistent"]["precision"] > pairs["first"]["precision"]
        met["consistent pivots give more right pairs than random ones"] = better
    return met


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--cold-start", type=int, default=400, help="worked answers of the cold start")
    parser.add_argument("--cold-lr", type=float, default=1e-4)
    parser.add_argument("--held-out", type=int, default=8, help="held-out sums to measure on, each in 4 languages")
    parser.add_argument("--pair-sums", type=int, default=24, help="sums of CM-Align's pairs, each in 4 languages")
    parser.add_argument("--dpo-lr", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=list(REWARDS), default=list(REWARDS))
    parser.add_argument("--pivots", nargs="*", choices=PIVOTS, default=list(PIVOTS))
    parser.add_argument("--out", type=Path, default=Path("out/sums_languages"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
