"""A whole distillation step against the length of its one document: memory and time of 512 to 8,192 tokens.

SmolLM2-135M in bf16 teaches its 12 evenly kept layers (fp32 weights, bf16 compute) one document of random ids, with
Adam, as a run does; each length in a process of its own. Memory is the step's peak, weights and Adam's moments
included. Attention, the one part whose time grows with the square, is also timed alone: the function that a step calls,
in its shapes, once for each of the teacher's layers and forward and backward for each of the student's.

Fitted over the lengths, each point by its relative error: memory = a + b T; seconds = a + b T + c T^2; and seconds less
what attention took alone = a + b T.

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

from setting.document import command_line, document, parsed, passed_on, refuse_on_red
from setting.memory import forget_peak, peak
from setting.pair import pair
from setting.sides import Side, serve
from setting.steps import adam, potstill_step

RESTS_ON = ["tests/ops/test_fused.py", "tests/ops/test_attention.py", "tests/train/test_training_module.py"]
LENGTHS = (512, 1024, 2048, 4096, 8192)
MIB = 2**20


def main() -> None:
    """The parent: refuses on a red test, asks a child for each length, prints one document."""
    options = arguments()
    if options.length:
        serve(lambda: clocked(options.length, twice=options.checkpoint_activations), held=True)
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    found = {length: measured(length, options) for length in options.lengths}
    fits = fitted(found)
    met = {
        "memory linear in the length, within 5 %": fits["memory"]["largest_residual"] <= 0.05,
        "time less attention linear in the length, within 10 %": fits["beside_attention"]["largest_residual"] <= 0.1,
    }
    print(document("length", {"lengths": found, "fits": fits}, met))


def measured(length: int, options: argparse.Namespace) -> dict[str, float]:
    """One length: the median of some steps, each with attention alone beside it; one of the longest."""
    side = Side(["--length", str(length), *passed_on(options, "cpu_seconds", "checkpoint_activations")])
    replies = [side.ask(number) for number in range(max(1, min(options.steps, 4096 // length)))]
    side.close()
    found = {what: statistics.median(one[what] for one in replies) for what in ("seconds", "attention_seconds")}
    found["mib"] = max(one["peak"] for one in replies) / MIB
    print(length, found, file=sys.stderr)
    return found


def clocked(length: int, *, twice: bool) -> Callable[[int], dict[str, float]]:
    """The child: a step on a document of `length` tokens and then attention alone, for every question.

    With `twice` the student's blocks keep their inputs alone and are computed again in the backward.
    """
    from potstill.train.activation_checkpointing import activation_checkpointing

    teacher, student = pair()
    kept = functools.partial(activation_checkpointing, student) if twice else contextlib.nullcontext
    step = potstill_step(teacher, student, adam(student))
    config, layers = teacher.config, student.config.num_hidden_layers
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    generator = torch.Generator().manual_seed(1)
    document = torch.randint(3, config.vocab_size, (length,), generator=generator).tolist()
    step([document[:64]])  # Adam's moments, and what libraries allocate once

    def once(number: int) -> dict[str, float]:
        forget_peak()
        start = time.perf_counter()
        with kept():
            step([document])
        seconds, most = time.perf_counter() - start, peak()
        alone = config.num_hidden_layers * attention(length, heads) + layers * attention(length, heads, trained=True)
        return {"seconds": seconds, "peak": most, "attention_seconds": alone}

    return once


def attention(length: int, heads: tuple[int, int, int], *, trained: bool = False, layers: int = 2) -> float:
    """Seconds of one layer's attention over one document, forward, and backward where it is `trained`."""
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


def fitted(found: dict[int, dict[str, float]]) -> dict[str, Any]:
    """The three fits, and the square's share of the longest step beside attention alone."""
    lengths = list(found)
    seconds, alone, mib = ([one[what] for one in found.values()] for what in ("seconds", "attention_seconds", "mib"))
    whole = fit(lengths, seconds, degree=2)
    longest = max(lengths)
    return {
        "memory": fit(lengths, mib, degree=1),
        "seconds": whole,
        "beside_attention": fit(lengths, [s - a for s, a in zip(seconds, alone, strict=True)], degree=1),
        "square_at_longest": whole["coefficients"][2] * longest**2,
        "attention_at_longest": found[longest]["attention_seconds"],
    }


def fit(lengths: Sequence[int], values: Sequence[float], *, degree: int) -> dict[str, Any]:
    """Least squares of relative errors: coefficients from the constant up, and the largest residual as a share."""
    known = np.array(values)
    powers = np.array([[length**power for power in range(degree + 1)] for length in lengths], dtype=float)
    found = np.linalg.lstsq(powers / known[:, None], np.ones(len(known)), rcond=None)[0]
    residuals = powers @ found / known - 1
    return {"coefficients": found.tolist(), "largest_residual": float(abs(residuals).max())}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--steps", type=int, default=3, help="steps of every length that has time for them")
    parser.add_argument("--checkpoint-activations", action="store_true", help="compute the student's blocks twice")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    return parsed(parser)


if __name__ == "__main__":
    main()
