"""One step of GRPO compared with TRL's GRPOTrainer: equality of loss and gradient in float32, and seconds of a step.

First, potstill draws 2 groups of 8 samples, and the policy moves away from the one that drew them, so that ratios are
not 1. Loss and gradient on these samples are computed by potstill, with the prompt shared, and by TRL, for GRPO,
Dr. GRPO and DAPO, in float32.

Then both take whole steps of GRPO with SmolLM2-135M-Instruct, in turn, each in its own process: `--prompts`
with 8 samples of at most 64 tokens, the reward brevity, one update, and float32 weights. Products are in `--dtype`, by
default the faster one on this machine. TRL samples with transformers' `generate`, and runs without gradient
checkpointing, which is faster and larger than its default. As the samples differ, sampled tokens per second are
compared; ratios are medians of the ratios of each step.

    python benchmarks/grpo.py --json           (needs: pip install 'potstill[bench]')
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from potstill.core.device import get_dtype_name, resolve_dtype
from setting.document import command_line, document, refuse_on_red
from setting.groups import (
    OLD_LOG_P,
    QUESTIONS,
    VARIANTS,
    load_policy,
    make_module,
    make_potstill_step,
    make_prompt_batch,
    make_rollout,
    make_trl_step,
    make_trl_trainer,
    pad_for_trl,
)
from setting.memory import peak
from setting.preferences import save_policy
from setting.sides import ask_once, serve, take_turns
from setting.steps import compute_cosine, differentiate, make_optimizer

RESTS_ON = [
    "tests/ops/test_advantage.py",
    "tests/ops/test_policy_gradient.py",
    "tests/objectives/test_grpo.py",
    "tests/train/rollouts/test_grouped.py",
]
SIDES = {"potstill": make_potstill_step, "trl": make_trl_step}
EQUAL_QUESTIONS, MAX_TOKENS = ("What is 3 + 4?", "Say hello to me."), 24  # of samples of different lengths, for float32


def main() -> None:
    """The parent: refuses if a test fails, compares in float32, lets the sides step in turn, prints one document."""
    options = parse_arguments()
    if options.side:
        serve(lambda: compare_in_float32 if options.side == "equality" else make_stepper(options))
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    dtype = get_dtype_name(resolve_dtype(options.dtype))
    with tempfile.TemporaryDirectory() as folder:
        save_policy(Path(folder))
        equality = ask_once(["--side", "equality"], folder) if options.equality else {}
        numbers = range(options.warm_up + options.steps)
        arguments = ["--folder", folder, "--dtype", dtype, "--prompts", str(options.prompts)]
        replies = take_turns(list(SIDES), numbers, arguments) if options.steps else {}
    figures: dict[str, Any] = {"float32": equality, "dtype of steps": dtype}
    met = {}
    if equality:
        gaps = equality.values()
        met["the float32 losses are TRL's to 1e-5"] = all(gap["loss_gap"] <= 1e-5 for gap in gaps)
        met["the float32 gradients are TRL's to a cosine of 0.99999"] = all(
            gap["gradient_cosine"] >= 0.99999 for gap in gaps
        )
    if replies:
        figures |= compare_steps(replies, options)
        met["three times TRL's sampled tokens/s"] = figures["times_faster"]["median"] >= 3
    print(document("grpo", figures, met))


def compare_steps(replies: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> dict[str, Any]:
    """Rates and peaks of both sides, and the ratio of their rates."""
    figures: dict[str, Any] = {}
    rates = {}
    for name, side_replies in replies.items():
        timed = side_replies[options.warm_up :]
        rates[name] = [reply["tokens"] / reply["seconds"] for reply in timed]
        figures[name] = {
            "sampled_tokens_per_second": statistics.median(rates[name]),
            "seconds": statistics.median(reply["seconds"] for reply in timed),
            "sampled_tokens": statistics.mean(reply["tokens"] for reply in timed),
            "peak_gib": side_replies[-1]["peak"] / 2**30,
        }
    ratios = [a / b for a, b in zip(rates["potstill"], rates["trl"], strict=True)]
    figures["times_faster"] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return figures


def make_stepper(options: argparse.Namespace) -> Callable[[int], dict[str, float]]:
    """The child of one side: takes a step for every question."""
    torch.manual_seed(1)
    policy, tokenizer = load_policy(Path(options.folder))
    optimizer, questions = make_optimizer(policy), QUESTIONS[: options.prompts]
    step = SIDES[options.side](policy, tokenizer, optimizer, questions=questions, dtype=resolve_dtype(options.dtype))

    def answer(number: int) -> dict[str, float]:
        start = time.perf_counter()
        loss, tokens = step()
        return {"seconds": time.perf_counter() - start, "tokens": tokens, "loss": loss, "peak": peak()}

    return answer


def compare_in_float32(folder: str) -> dict[str, dict[str, float]]:
    """The child that compares loss and gradient of every variant on the same samples."""
    torch.manual_seed(0)
    policy, tokenizer = load_policy(Path(folder))
    rollout = make_rollout(policy, tokenizer, questions=EQUAL_QUESTIONS, max_tokens=MAX_TOKENS, updates=2)
    rollout.roll_out([make_prompt_batch(rollout)], policy, step=0)
    (batch,) = rollout.update_batches  # with the log-probabilities of the policy that drew the samples
    inputs = pad_for_trl(batch, tokenizer.pad_token_id)
    trainers = {
        variant: make_trl_trainer(
            policy, tokenizer, variant, bf16=False, questions=EQUAL_QUESTIONS, max_tokens=MAX_TOKENS
        )
        for variant in VARIANTS
    }
    inputs[OLD_LOG_P] = compute_log_p(trainers["grpo"], policy, inputs)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.01 * float(weight.std(correction=0)))
    report = {}
    for variant, trainer in trainers.items():
        module = make_module(policy, variant, dtype=torch.float32).train()
        loss, gradient = differentiate(policy, module(**batch)["loss"])
        trl_loss, trl_gradient = differentiate(policy, trainer._compute_loss(policy, inputs))
        cosine = compute_cosine(gradient, trl_gradient)
        report[variant] = {"loss": loss, "loss_gap": abs(loss - trl_loss), "gradient_cosine": cosine}
        print(f"{variant}: {report[variant]}", file=sys.stderr)
    return report


def compute_log_p(trainer: Any, policy: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The log-probability of each token of the padded samples under a policy, by TRL."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        log_p, *_ = trainer._get_per_token_logps_and_entropies(policy, ids, mask, inputs["completion_ids"].shape[1])
    return log_p


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side; 0: equality alone")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step; 8 take more than 24 GB")
    parser.add_argument("--no-equality", dest="equality", action="store_false", help="time steps alone")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="auto (default), float32 or bfloat16")
    parser.add_argument("--side", choices=(*SIDES, "equality"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
