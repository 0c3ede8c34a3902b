"""What a student learns in the same time with potstill and with TRL's GKDTrainer: held-out bits per byte and KL.

Both use the same teacher (SmolLM2-135M, bf16), initial student (12 evenly chosen layers, fp32 weights, bf16 compute),
documents in the same order, objective (forward KL alone), optimizer, and learning rate at the same share of the time.
Only the step differs (see distill_step.py). Each side trains alone in its own process with `--threads` threads, by that
process's own processor time, so that other work on the machine affects neither. Loading and measuring do not count. A
trained student stays in `--out` and is not trained again.

    python benchmarks/equal_time.py --json --minutes 20 --seeds 1 2         (needs: pip install 'potstill[bench]')
"""

import argparse
import contextlib
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from setting.document import command_line, document, refuse_on_red
from setting.pair import load_pair
from setting.steps import make_optimizer, make_potstill_step, make_trl_step
from setting.text import CONTEXT

RESTS_ON = ["tests/ops/test_fused.py", "tests/ops/test_attention.py", "tests/evaluate/test_agreement.py"]
SIDES = {"potstill": make_potstill_step, "trl": make_trl_step}
GOAL = "better in every measure at every seed"
WARM_UP, FINAL = 0.05, 0.1


def main() -> None:
    """Trains every side and seed that `--out` lacks, measures all on the same text, prints one document."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if options.side:
        train(options.side, options.seeds[0], options)
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    for seed in options.seeds:
        for side in SIDES:
            if not (get_folder(options, side, seed) / "trained.json").exists():
                command = [sys.executable, *sys.argv, "--side", side, "--seeds", str(seed)]
                subprocess.run(command, check=True, stdout=sys.stderr)
    print(report(options))


def train(side: str, seed: int, options: argparse.Namespace) -> None:
    """Trains one side for its time; saves the student and what it did to `--out`."""
    from potstill.core.memory import retain_freed_memory

    torch.manual_seed(seed)
    teacher, student = load_pair()
    optimizer = make_optimizer(student)
    memory = contextlib.nullcontext() if side == "trl" else retain_freed_memory()  # as in a potstill run
    memory.__enter__()  # until the process ends
    step = SIDES[side](teacher, student, optimizer)
    budget = options.minutes * 60 * options.threads
    tokens, steps, losses = 0, 0, []
    batches = iterate_batches(seed, options.batch_tokens)
    started = time.process_time()
    while (spent := time.process_time() - started) < budget:
        optimizer.param_groups[0]["lr"] = options.learning_rate * learning_rate_factor(spent / budget)
        batch = next(batches)
        losses.append(step(batch))
        tokens, steps = tokens + sum(map(len, batch)), steps + 1
        if steps % 50 == 1:
            print(
                f"{side} seed {seed}: step {steps}, {tokens} tokens, {spent:.0f} s, {losses[-1]:.3f}", file=sys.stderr
            )
    out = get_folder(options, side, seed)
    student.save_pretrained(out)
    done = {"side": side, "seed": seed, "tokens": tokens, "steps": steps, "seconds": spent, "losses": losses}
    (out / "trained.json").write_text(json.dumps(done))


def learning_rate_factor(share: float) -> float:
    """The learning rate after `share` of the time: a linear rise, then a cosine down to a tenth."""
    if share < WARM_UP:
        return share / WARM_UP
    along = (share - WARM_UP) / (1 - WARM_UP)
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * along)) / 2


def iterate_batches(seed: int, tokens: int) -> Iterator[list[list[int]]]:
    """Ragged documents of about `tokens` tokens per step, from Python's docstrings, in an order drawn with `seed`."""
    from potstill.data.corpus import load_corpus
    from potstill.data.tokenize import tokenize_corpus
    from potstill.models import gguf, locate

    rows = tokenize_corpus(load_corpus("stdlib"), gguf.load_tokenizer(locate.get_packaged_path()))
    pieces = [row.input_ids[i : i + CONTEXT] for row in rows for i in range(0, len(row.input_ids) - 1, CONTEXT)]
    order = random.Random(seed)
    pending: list[list[int]] = []
    while True:
        order.shuffle(pieces)
        for piece in pieces:
            if pending and sum(map(len, pending)) + len(piece) > tokens:
                yield pending
                pending = []
            pending.append(piece)


def report(options: argparse.Namespace) -> str:
    """Each student compared with the teacher on the same held-out documents, and their paired differences."""
    from transformers import AutoModelForCausalLM

    from potstill.data.corpus import load_corpus
    from potstill.evaluate.agreement import collect_teacher_outputs, compare_with_teacher
    from potstill.evaluate.measures import compute_paired_differences, measure_quality
    from potstill.evaluate.scoring_windows import ScoringConfig
    from potstill.models import gguf, locate
    from potstill.models.tokenizers.vocabulary import count_token_ids
    from potstill.stages.dataset import build_rows

    teacher, first = load_pair()
    tokenizer = gguf.load_tokenizer(locate.get_packaged_path())
    corpus = load_corpus("stdlib", split="validation")
    rows = build_rows(corpus, tokenizer, documents=options.documents)
    teacher_outputs = collect_teacher_outputs(
        teacher, rows, ScoringConfig(context=CONTEXT, vocabulary=count_token_ids(tokenizer), dtype=torch.bfloat16)
    )
    comparisons = {"at the start": compare_with_teacher(teacher_outputs, first)}
    facts: dict[str, Any] = {}
    for seed in options.seeds:
        for side in SIDES:
            out = get_folder(options, side, seed)
            student = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            name = f"{side}, seed {seed}"
            comparisons[name] = compare_with_teacher(teacher_outputs, student)
            facts[name] = {k: v for k, v in json.loads((out / "trained.json").read_text()).items() if k != "losses"}
    figures = {
        name: facts.get(name, {}) | {measure.name: measure.to_dict() for measure in measure_quality(compared)}
        for name, compared in comparisons.items()
    }
    pairs = [{f"potstill, seed {seed}", f"trl, seed {seed}"} for seed in options.seeds]
    beside = [
        difference
        for difference in compute_paired_differences(comparisons)
        if {difference["a"], difference["b"]} in pairs
    ]
    better = {"bits_per_byte": 1, "teacher_kl": 1, "teacher_agreement": -1}
    worst = (max(better[f["name"]] * f["low"], better[f["name"]] * f["high"]) for f in beside)
    figures = {"minutes": options.minutes, "students": figures, "potstill less TRL": beside}
    return document(
        "equal_time", figures, {GOAL: all(measure < 0 for measure in worst)}, goals={GOAL: "the interval excludes 0"}
    )


def get_folder(options: argparse.Namespace, side: str, seed: int) -> Path:
    """The folder of the student of one side and seed."""
    return Path(options.out) / f"{side}-{seed}-{options.minutes:g}m"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=768, help="tokens per step; TRL's memory grows with it")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--documents", type=int, default=100, help="held-out documents to measure on")
    parser.add_argument("--out", default="out/equal-time")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
