"""One DPO step compared with TRL's DPOTrainer: pairs/s, peak memory, and equality of loss and gradient in float32.

Four sides: potstill with a live reference, both answers of a pair sharing one copy of their prompt; the same with the
prompt repeated; the same as the first with cached log-probabilities of the reference; and TRL. All train
SmolLM2-135M-Instruct with float32 weights on the same pairs of HH-RLHF harmless-base in every step, with the same
optimizer. Products are in `--dtype`, by default the faster one on this machine. Each side has a process of its own, so
that its peak memory is its own; the parent asks them for one step in turn. TRL runs without gradient checkpointing,
which is faster and larger than its default, and pads, since its `padding_free` is off in DPO. potstill keeps memory
that it frees, as a run does. Rates are medians over steps, and ratios are medians of the ratios of each step.

First, one process computes loss and gradient of some batches in float32 by potstill, with shared and repeated prompts,
and by TRL. The policy has moved away from the reference, so that the loss is not log 2.

    POTSTILL_DATA=... python benchmarks/align_step.py --json           (needs: pip install 'potstill[bench]')
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from potstill.core.device import get_dtype_name, resolve_dtype
from setting.document import command_line, document, refuse_on_red
from setting.memory import peak
from setting.preferences import (
    CachedReference,
    Pair,
    collate_trl,
    compute_reference,
    load_pairs,
    load_policy,
    make_module,
    make_potstill_step,
    make_trl_step,
    make_trl_trainer,
    save_policy,
)
from setting.sides import ask_once, serve, take_turns
from setting.steps import compute_cosine, differentiate, make_optimizer

RESTS_ON = [
    "tests/ops/test_row_spans.py",
    "tests/ops/test_preference.py",
    "tests/objectives/test_preference.py",
    "tests/data/test_shared_prompts.py",
]
SIDES = ("potstill", "repeated", "cached", "trl")
CACHE, POLICY = "reference.pt", "policy"  # below the folder of a run
RATIOS = {  # of the seconds of two sides
    "times_faster": ("trl", "potstill"),
    "sharing_times_repeating": ("repeated", "potstill"),
    "cached_times_live": ("potstill", "cached"),
    "cached_times_trl": ("trl", "cached"),
}
GOALS = {
    "the float32 loss is TRL's": "loss_gap <= 1e-5",
    "the float32 gradient is TRL's": "gradient_cosine >= 0.99999",
    "five times TRL's pairs/s": "times_faster >= 5",
    "half of TRL's memory": "share_of_memory <= 1/2",
    "sharing 1.4 times repeating": "sharing_times_repeating >= 1.4",
    "a cached reference 1.25 times a live one": "cached_times_live >= 1.25",
}


def main() -> None:
    """The parent: refuses if a test fails, compares in float32, lets the sides step in turn, prints one document."""
    options = parse_arguments()
    if options.side in ("equality", "capture"):
        serve(lambda: compare_in_float32 if options.side == "equality" else partial(capture_reference, options.dtype))
        return
    if options.side:
        serve(lambda: make_stepper(options), retain_memory=options.side != "trl")
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    dtype = get_dtype_name(resolve_dtype(options.dtype))
    pairs = load_pairs(options.pairs * (options.steps + options.warm_up))
    batches = [pairs[start : start + options.pairs] for start in range(0, len(pairs), options.pairs)]
    figures: dict[str, Any] = {"tokens": describe_tokens(batches), "dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        save_policy(Path(folder) / POLICY)
        if options.equal_steps:
            figures["float32"] = ask_once(["--side", "equality"], [folder, batches[: options.equal_steps]])
        if "cached" in options.sides:
            ask_once(["--side", "capture", "--dtype", dtype], [folder, batches])
        replies = take_turns(options.sides, batches, ["--folder", folder, "--dtype", dtype])
    figures |= compare_sides(replies, options)
    print(document("align_step", figures, check_goals(figures), goals=GOALS))


def compare_sides(replies: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> dict[str, Any]:
    """Rates and peaks of every side, and ratios of sides from the same run."""
    figures: dict[str, Any] = {}
    seconds = {}
    for side, side_replies in replies.items():
        seconds[side] = [reply["seconds"] for reply in side_replies[options.warm_up :]]
        rates = [options.pairs / step for step in seconds[side]]
        figures[side] = {
            "pairs_per_second": statistics.median(rates),
            "range": [min(rates), max(rates)],
            "peak_gib": side_replies[-1]["peak"] / 2**30,
            "losses": [reply["loss"] for reply in side_replies],
        }
    figures["ratios"] = {
        name: compare(seconds, slower, faster)
        for name, (slower, faster) in RATIOS.items()
        if {slower, faster} <= set(seconds)
    }
    if {"potstill", "trl"} <= set(figures):
        figures["share_of_memory"] = figures["potstill"]["peak_gib"] / figures["trl"]["peak_gib"]
    return figures


def check_goals(figures: Mapping[str, Any]) -> dict[str, bool]:
    """Which goals are met, of those that were measured."""
    medians = {name: ratio["median"] for name, ratio in figures["ratios"].items()}
    least = {
        "five times TRL's pairs/s": ("times_faster", 5),
        "sharing 1.4 times repeating": ("sharing_times_repeating", 1.4),
        "a cached reference 1.25 times a live one": ("cached_times_live", 1.25),
    }
    met = {goal: medians[name] >= value for goal, (name, value) in least.items() if name in medians}
    if equality := figures.get("float32"):
        met["the float32 loss is TRL's"] = equality["loss_gap"] <= 1e-5
        met["the float32 gradient is TRL's"] = equality["gradient_cosine"] >= 0.99999
    if "share_of_memory" in figures:
        met["half of TRL's memory"] = figures["share_of_memory"] <= 1 / 2
    return met


def compare(seconds: Mapping[str, list[float]], slower: str, faster: str) -> dict[str, float]:
    """How many times as long the steps of one side take as those of another."""
    ratios = [a / b for a, b in zip(seconds[slower], seconds[faster], strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def describe_tokens(batches: list[list[Pair]]) -> dict[str, float]:
    """Mean tokens of a pair by part."""
    pairs = [pair for batch in batches for pair in batch]
    names = ("prompt", "chosen", "rejected")
    return {name: statistics.mean(len(pair[n]) for pair in pairs) for n, name in enumerate(names)}


def make_stepper(options: argparse.Namespace) -> Callable[[list[Pair]], dict[str, float]]:
    """The child of one side: takes a step for every batch that it receives."""
    torch.manual_seed(1)
    dtype = resolve_dtype(options.dtype)
    policy, reference = load_policy(Path(options.folder) / POLICY, torch.float32 if options.side == "trl" else dtype)
    optimizer = make_optimizer(policy)
    if options.side == "trl":
        step = make_trl_step(policy, reference, optimizer, dtype=dtype)
    else:
        source = CachedReference(torch.load(Path(options.folder) / CACHE)) if options.side == "cached" else reference
        step = make_potstill_step(policy, source, optimizer, shared=options.side != "repeated", dtype=dtype)
    del reference  # the side with a cache has none

    def answer(batch: list[Pair]) -> dict[str, float]:
        start = time.perf_counter()
        loss = step(batch)
        return {"seconds": time.perf_counter() - start, "loss": loss, "peak": peak()}

    return answer


def capture_reference(name: str, question: list[Any]) -> int:
    """The child that computes the reference's log-probabilities of every batch, and stores them in a folder."""
    folder, batches = question
    dtype = resolve_dtype(name)
    module = make_module(*load_policy(Path(folder) / POLICY, dtype), dtype=dtype)
    torch.save([compute_reference(module, batch) for batch in batches], Path(folder) / CACHE)
    return len(batches)


def compare_in_float32(question: list[Any]) -> dict[str, float]:
    """The child that compares loss and gradient of a policy that has moved away from its reference."""
    from potstill.data.preferences import batch_of

    folder, batches = question
    torch.manual_seed(0)
    policy, reference = load_policy(Path(folder) / POLICY, torch.float32)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02 * float(weight.std(correction=0)))
    module = make_module(policy.train(), reference, dtype=torch.float32)
    trainer = make_trl_trainer(policy, reference, bf16=False)
    forms: list[Callable[[list[Pair]], torch.Tensor]] = [
        lambda batch: module(**batch_of(batch))["loss"],
        lambda batch: module(**batch_of(batch, shared=False))["loss"],
        lambda batch: trainer.compute_loss(policy, collate_trl(trainer, batch)),
    ]
    gaps, cosines, shared_gaps = [], [], []
    for batch in batches:
        (loss, gradient), repeated, trl = (differentiate(policy, form(batch)) for form in forms)
        gaps.append(abs(loss - trl[0]))
        shared_gaps.append(abs(loss - repeated[0]))
        cosines.append(compute_cosine(gradient, trl[1]))
        print(f"float32: {loss} and {trl[0]}, cosine {cosines[-1]}", file=sys.stderr)
    return {
        "loss_gap": max(gaps),
        "gradient_cosine": min(cosines),
        "shared_loss_gap": max(shared_gaps),
        "batches": len(batches),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=4, help="pairs per step")
    parser.add_argument("--dtype", default="auto", help="auto (default), float32 or bfloat16")
    parser.add_argument("--equal-steps", type=int, default=3, help="batches that are compared in float32; 0: none")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="all four take more than 24 GB")
    parser.add_argument("--side", choices=(*SIDES, "equality", "capture"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
