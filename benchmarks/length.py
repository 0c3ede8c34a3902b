"""A whole distillation step on one document of 512 to 8,192 tokens: memory and time against the length.

SmolLM2-135M in bf16 teaches a student of 12 of its layers (fp32 weights, bf16 compute) on one document of random ids,
with Adam, as a run does. Each length has its own process. Memory is the step's peak, including weights and Adam's
moments. Attention, the only part whose time grows with the square, is also timed alone: the function that a step
calls, in its shapes, once for each of the teacher's layers, and forward and backward for each of the student's.

Fits over the lengths, each point weighted by its relative error: memory = a + b T; seconds = a + b T + c T^2; and
seconds minus attention alone = a + b T.

    python benchmarks/length.py --json
"""

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from setting.document import command_line, document, forward_flags, parse_arguments, refuse_on_red
from setting.memory import peak, reset_peak
from setting.pair import load_pair
from setting.sides import Side, serve
from setting.steps import make_optimizer, make_potstill_step

RESTS_ON = ["tests/ops/test_fused.py", "tests/ops/test_attention.py", "tests/train/test_training_module.py"]
LENGTHS = (512, 1024, 2048, 4096, 8192)
MIB = 2**20


def main() -> None:
    """The parent: refuses if a test fails, asks a child for each length, prints one document."""
    options = parse_options()
    if options.length:
        serve(
            lambda: make_timer(options.length, checkpoint_activations=options.checkpoint_activations),
            retain_memory=True,
        )
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    measures = {length: measure_length(length, options) for length in options.lengths}
    fits = fit_all(measures)
    met = {
        "memory linear in the length, within 5 %": fits["memory"]["largest_residual"] <= 0.05,
        "time less attention linear in the length, within 10 %": fits["beside_attention"]["largest_residual"] <= 0.1,
    }
    print(document("length", {"lengths": measures, "fits": fits}, met))


def measure_length(length: int, options: argparse.Namespace) -> dict[str, float]:
    """One length: the median of a few steps, each with attention alone; one step of the longest."""
    side = Side(["--length", str(length), *forward_flags(options, "cpu_seconds", "checkpoint_activations")])
    replies = [side.ask(number) for number in range(max(1, min(options.steps, 4096 // length)))]
    side.close()
    figures = {what: statistics.median(reply[what] for reply in replies) for what in ("seconds", "attention_seconds")}
    figures["mib"] = max(reply["peak"] for reply in replies) / MIB
    print(length, figures, file=sys.stderr)
    return figures


def make_timer(length: int, *, checkpoint_activations: bool) -> Callable[[int], dict[str, float]]:
    """The child: for every question a step on a document of `length` tokens, then attention alone.

    With `checkpoint_activations` the student's blocks save only their inputs and are computed again in the backward.
    """
    from potstill.train.activation_checkpointing import activation_checkpointing

    teacher, student = load_pair()
    checkpointing = (
        functools.partial(activation_checkpointing, student) if checkpoint_activations else contextlib.nullcontext
    )
    step = make_potstill_step(teacher, student, make_optimizer(student))
    config, layers = teacher.config, student.config.num_hidden_layers
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    generator = torch.Generator().manual_seed(1)
    document = torch.randint(3, config.vocab_size, (length,), generator=generator).tolist()
    step([document[:64]])  # Adam's moments, and what libraries allocate once

    def answer(number: int) -> dict[str, float]:
        reset_peak()
        start = time.perf_counter()
        with checkpointing():
            step([document])
        seconds, most = time.perf_counter() - start, peak()
        alone = config.num_hidden_layers * time_attention(length, heads) + layers * time_attention(
            length, heads, trained=True
        )
        return {"seconds": seconds, "peak": most, "attention_seconds": alone}

    return answer


def time_attention(length: int, heads: tuple[int, int, int], *, trained: bool = False, layers: int = 2) -> float:
    """Seconds of one layer's attention over one document, forward, and backward if it is `trained`."""
    from potstill.ops.attention import document_attention

    queries, keys, width = heads
    q, k, v = (torch.randn(1, n, length, width, dtype=torch.bfloat16) for n in (queries, keys, keys))
    for tensor in (q, k, v):
        tensor.requires_grad_(trained)
    start = time.perf_counter()
    for _ in range(layers):
        mixed = document_attention(q, k, v, ((length,),), scale=width**-0.5)
        if trained:
            mixed.backward(mixed)
    return (time.perf_counter() - start) / layers


def fit_all(measures: dict[int, dict[str, float]]) -> dict[str, Any]:
    """The three fits, and the quadratic part's share of the longest step compared with attention alone."""
    lengths = list(measures)
    seconds, alone, mib = (
        [figures[what] for figures in measures.values()] for what in ("seconds", "attention_seconds", "mib")
    )
    whole = fit(lengths, seconds, degree=2)
    longest = max(lengths)
    return {
        "memory": fit(lengths, mib, degree=1),
        "seconds": whole,
        "beside_attention": fit(lengths, [s - a for s, a in zip(seconds, alone, strict=True)], degree=1),
        "square_at_longest": whole["coefficients"][2] * longest**2,
        "attention_at_longest": measures[longest]["attention_seconds"],
    }


def fit(lengths: Sequence[int], values: Sequence[float], *, degree: int) -> dict[str, Any]:
    """Least squares of relative errors: coefficients from the constant up, and the largest relative residual."""
    targets = np.array(values)
    powers = np.array([[length**power for power in range(degree + 1)] for length in lengths], dtype=float)
    coefficients = np.linalg.lstsq(powers / targets[:, None], np.ones(len(targets)), rcond=None)[0]
    residuals = powers @ coefficients / targets - 1
    return {"coefficients": coefficients.tolist(), "largest_residual": float(abs(residuals).max())}


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--steps", type=int, default=3, help="steps per length; long documents get fewer")
    parser.add_argument("--checkpoint-activations", action="store_true", help="compute the student's blocks twice")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    return parse_arguments(parser)


if __name__ == "__main__":
    main()
