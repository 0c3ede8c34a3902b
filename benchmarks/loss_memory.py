"""The loss alone against the vocabulary: memory beyond heads and gradients, and time, of 32k to 262k tokens.

The fused loss, through the objective as a step calls it, beside TRL's chunked divergence (what its DistillationTrainer
calls; its torch form, since there is no Triton on a CPU) and the plain definition, which holds all logits, as far as
`--plain-up-to`. Forward KL of 2,048 random rows of width 576 under bf16 autocast: a student's head in fp32 that is
trained, a teacher's own in bf16. Each side and size lives in a process of its own, and the sides are asked in turn.
Memory is that of the first pass: its peak, less what was there before it and the gradients that it leaves.

Flatness is that of ours beyond heads, the student's head in the dtype of the products (1,152 bytes a token) being one;
beside TRL, whose tiles are of 32,768 tokens whatever the vocabulary, all of it counts.

    python benchmarks/loss_memory.py --json           (needs: pip install 'potstill[bench]')
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from setting.document import command_line, document, parsed, passed_on, refuse_on_red
from setting.memory import forget_peak, peak, resident
from setting.sides import Side, alone, serve

RESTS_ON = ["tests/ops/test_fused.py", "tests/ops/test_divergence.py", "tests/objectives"]
VOCABULARIES = (2**15, 2**16, 2**17, 2**18)
ROWS, WIDTH = 2048, 576  # more rows than are alive at once, at every vocabulary
HEAD_COPY = 2 * WIDTH  # bytes a token
NOISE = 0.3  # between teacher and student: a KL of some 0.4 nats
AGREE = 0.05  # how far apart losses and gradients may be, as vectors: logits of size 3 in bf16 are off by some 0.01
MIB = 2**20


class Problem(NamedTuple):
    """What the loss is taken of; what is trained wants a gradient."""

    rows: torch.Tensor
    weight: torch.Tensor
    teacher_rows: torch.Tensor
    teacher_weight: torch.Tensor


def main() -> None:
    """The parent: refuses on a red test, lets the sides compute in turn, prints one document."""
    options = arguments()
    if options.role:
        roles = {"side": lambda: clocked(options.side, options.vocabulary), "agreement": lambda: agreement}
        serve(roles[options.role], held=True)  # as in a run, for all sides alike
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    agreed = alone(["--role", "agreement"], options.vocabularies[0])
    for name, gaps in agreed.items():
        assert max(gaps.values()) <= AGREE, f"{name} computes something else: {gaps}"
    found = {vocabulary: compare(vocabulary, options) for vocabulary in options.vocabularies}
    mib = [found[size]["potstill"]["mib"] - HEAD_COPY * size / MIB for size in (min(found), max(found))]
    figures = {"agreement": agreed, "vocabularies": found, "growth": mib[1] / mib[0], "growth_mib": mib[1] - mib[0]}
    met = {
        "memory beyond heads and gradients flat, within 20 %": abs(figures["growth"] - 1) <= 0.2,
        "no more memory than TRL's at any vocabulary": max(one["share_of_memory"] for one in found.values()) <= 1,
        "faster than TRL's at every vocabulary": min(one["times_faster"] for one in found.values()) > 1,
    }
    print(document("loss_memory", figures, met))


def compare(vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    """All sides at one vocabulary."""
    names = [name for name in LOSSES if name != "plain" or vocabulary <= options.plain_up_to]
    shared = ["--role", "side", "--vocabulary", str(vocabulary), *passed_on(options, "cpu_seconds")]
    sides = {name: Side([*shared, "--side", name]) for name in names}
    replies: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(1 + options.rounds):
        for name, side in sides.items():
            replies[name].append(side.ask(number))
    for side in sides.values():
        side.close()
    found: dict[str, Any] = {}
    for name, said in replies.items():
        seconds = statistics.median(one["seconds"] for one in said[1:])
        found[name] = {"mib": said[0]["beyond"] / MIB, "seconds": seconds, "loss": said[0]["loss"]}
    found["times_faster"] = found["trl"]["seconds"] / found["potstill"]["seconds"]
    found["share_of_memory"] = found["potstill"]["mib"] / found["trl"]["mib"]
    print(vocabulary, found, file=sys.stderr)
    return found


def problem(vocabulary: int, *, rows: int = ROWS) -> Problem:
    """Rows and heads whose logits spread as a language model's do, the student's the teacher's with noise."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    teacher_rows, teacher_weight = normal(rows, WIDTH), normal(vocabulary, WIDTH).mul_(3 * WIDTH**-0.5)
    student_rows = torch.add(teacher_rows, normal(rows, WIDTH), alpha=NOISE)
    return Problem(
        student_rows.requires_grad_(),
        teacher_weight.clone().requires_grad_(),
        teacher_rows.bfloat16(),
        teacher_weight.bfloat16(),
    )


def by_potstill(given: Problem) -> torch.Tensor:
    """The objective over one document, as a study calls it."""
    from potstill.core.types import Head, Signals
    from potstill.objectives.logit_distillation import LogitDistillation

    count = len(given.rows)
    ids = torch.zeros(1, count + 1, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "documents": ids, "position_ids": torch.arange(count + 1)[None]}
    heads = Head(given.weight), Head(given.teacher_weight)
    student, teacher = (
        Signals(rows, head.logits, head) for rows, head in zip((given.rows, given.teacher_rows), heads, strict=True)
    )
    return LogitDistillation()({"student": student}, {"teacher": teacher}, batch)["distill"] / count


def by_trl(given: Problem) -> torch.Tensor:
    """What TRL 1.16's DistillationTrainer computes."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(given.rows))
    rows, teacher_rows = given.rows[None], given.teacher_rows[None]
    loss: torch.Tensor = _chunked_divergence_loss(
        rows, teacher_rows, given.weight, given.teacher_weight, mask, beta=0.0
    )[0]
    return loss


def by_definition(given: Problem) -> torch.Tensor:
    """All logits at once, by autograd."""
    from potstill.core.types import Head
    from potstill.ops.fused import sum_row_losses_densely
    from potstill.ops.row_loss import DivergenceRows

    teacher, targets = Head(given.teacher_weight), torch.zeros(len(given.rows), dtype=torch.long)
    rows = given.rows.to(torch.bfloat16)
    frozen = {"teacher": lambda start, stop: teacher.logits(given.teacher_rows[start:stop])}
    return sum_row_losses_densely([DivergenceRows()], rows, Head(given.weight), targets=targets, frozen=frozen)[
        0
    ] / len(rows)


LOSSES: dict[str, Callable[[Problem], torch.Tensor]] = {
    "potstill": by_potstill,
    "trl": by_trl,
    "plain": by_definition,
}


def passed(loss: Callable[[Problem], torch.Tensor], given: Problem) -> float:
    """Forward and backward; the gradients are left in `given`."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(given)
    value.backward()
    return value.item()


def clocked(side: str, vocabulary: int) -> Callable[[int], dict[str, float]]:
    """The child: one pass a question."""
    from potstill.core.memory import trim_memory

    loss = LOSSES[side]
    passed(loss, problem(64, rows=8))  # what libraries allocate once
    given = problem(vocabulary)
    trim_memory()
    kept = 4 * (given.rows.numel() + given.weight.numel())

    def once(number: int) -> dict[str, float]:
        given.rows.grad = given.weight.grad = None
        before = resident()
        forget_peak()
        start = time.perf_counter()
        value = passed(loss, given)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": value, "beyond": peak() - before - kept}

    return once


def agreement(vocabulary: int) -> dict[str, dict[str, float]]:
    """How far our loss and gradients are from TRL's and the definition's, on the same tensors."""
    given = problem(vocabulary)
    found = {}
    for name, loss in LOSSES.items():
        given.rows.grad = given.weight.grad = None
        value = torch.tensor(passed(loss, given))
        found[name] = {"loss": value, "rows": given.rows.grad, "head": given.weight.grad}
    ours = found.pop("potstill")
    return {name: {what: distance(ours[what], theirs[what]) for what in ours} for name, theirs in found.items()}


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs|, as vectors."""
    return (torch.dist(ours, theirs) / theirs.norm()).item()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--rounds", type=int, default=2, help="timed passes of every side, after the first")
    parser.add_argument("--plain-up-to", type=int, default=2**16, help="the largest vocabulary of the plain definition")
    parser.add_argument("--role", choices=("side", "agreement"), help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    return parsed(parser)


if __name__ == "__main__":
    main()
