"""GRPO on sums of two digits: how often SmolLM2 is right on held-out sums before and after a few steps, by variant.

A step has 6 prompts with 8 samples of at most `--max-tokens` tokens, and one update. The reward is `accuracy`. A
quarter of the sums is held out, with both orders of each. Accuracy is that of 4 samples of each held-out sum at
temperature 1, before and after, with an interval over prompts; beside it the mean reward of every step. A finished run
in `--out` is not repeated, and a stopped one continues.

    python benchmarks/grpo_sums.py --json --out runs --steps 20 --seeds 1
"""

import argparse
from pathlib import Path
from typing import Any

from setting.document import command_line, document, refuse_on_red
from setting.runs import select_measures
from setting.sums import Files, train_grpo, write_sums

RESTS_ON = ["tests/train/rollouts/test_grouped.py", "tests/stages/align/test_prompts.py"]
VARIANTS = ("grpo", "dr_grpo", "dapo", "rloo")
MEASURES = ("sampled_accuracy", "cut_samples", "sample_tokens")
CONTEXT = 256  # of a prompt with its samples


def main() -> None:
    """Trains and measures what `--out` lacks, and prints one document."""
    options = parse_arguments()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    files = write_sums(options.out / "sums", numbers=range(options.numbers))
    names = {f"{variant}, seed {seed}": (variant, seed) for variant in options.only for seed in options.seeds}
    figures = {name: train(files, variant, seed, options) for name, (variant, seed) in names.items()}
    met = {f"{name}: at least 0.8": run["after"]["sampled_accuracy"][0] >= 0.8 for name, run in figures.items()}
    print(document("grpo_sums", figures, met))


def train(files: Files, variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The measures of one run before and after, and the mean reward of the samples of every step."""
    from potstill.core.card import BEFORE_TRAINING, read_card

    out = options.out / f"{variant}-{options.steps}-{seed}"
    train_grpo(
        out,
        options.model,
        files,
        objective=f"grpo:variant={variant}",
        reward="accuracy",
        context=CONTEXT,
        steps=options.steps,
        max_tokens=options.max_tokens,
        lr=options.lr,
        seed=seed,
    )
    card = read_card(out)
    measures, steps = card["measures"], read_steps(out)
    return {
        "before": select_measures(measures[BEFORE_TRAINING], MEASURES),
        "after": select_measures(measures[out.name], MEASURES),
        "rewards": [step["reward"] for step in steps],
        "flat_groups": [step["flat_groups"] for step in steps],
        "sample_tokens": [step["sample_tokens"] for step in steps],
        "seconds": card["cost"]["seconds"],
    }


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The metrics of every training step."""
    from potstill.core.metrics_log import METRICS_FILE, read_metrics

    return [line for line in read_metrics(folder / METRICS_FILE) if "flat_groups" in line]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--numbers", type=int, default=10, help="the sums are of two numbers from 0 to below this")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("out/grpo_sums"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
