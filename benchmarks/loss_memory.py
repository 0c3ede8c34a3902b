"""The loss alone for vocabularies of 32k to 262k tokens: memory beyond heads and gradients, and time.

The fused loss, called through the objective as in a step, is compared with TRL's chunked divergence (which its
DistillationTrainer calls; its torch form, since there is no Triton on a CPU) and with the plain definition, which holds
all logits, up to `--plain-up-to`. The loss is forward KL of 2,048 random rows of width 576 under bf16 autocast, with a
trained student's head in fp32 and a teacher's own in bf16. Each side and size has its own process, and the sides are
asked in turn. Memory is that of the first pass: its peak minus what existed before and the gradients that it leaves.

The goal of constant memory is for potstill's memory beyond the heads. The student's head in the compute dtype (1,152
bytes per token) counts as a head. The comparison with TRL, whose tiles are 32,768 tokens wide at any vocabulary, counts
all of it.

    python benchmarks/loss_memory.py --json           (needs: pip install 'potstill[bench]')
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from setting.document import command_line, document, forward_flags, parse_arguments, refuse_on_red
from setting.memory import peak, reset_peak, resident_bytes
from setting.sides import Side, ask_once, serve

RESTS_ON = ["tests/ops/test_fused.py", "tests/ops/test_divergence.py", "tests/objectives"]
VOCABULARIES = (2**15, 2**16, 2**17, 2**18)
ROWS, WIDTH = 2048, 576  # more rows than are alive at once, at every vocabulary
HEAD_COPY = 2 * WIDTH  # bytes a token
NOISE = 0.3  # between teacher and student: a KL of some 0.4 nats
AGREE = 0.05  # how far apart losses and gradients may be, as vectors: logits of size 3 in bf16 are off by some 0.01
MIB = 2**20


class Problem(NamedTuple):
    """The inputs of the loss; trained tensors require a gradient."""

    rows: torch.Tensor
    weight: torch.Tensor
    teacher_rows: torch.Tensor
    teacher_weight: torch.Tensor


def main() -> None:
    """The parent: refuses if a test fails, lets the sides compute in turn, prints one document."""
    options = parse_options()
    if options.role:
        roles = {"side": lambda: make_timer(options.side, options.vocabulary), "agreement": lambda: measure_agreement}
        serve(roles[options.role], retain_memory=True)  # as in a run, for all sides alike
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    gaps_by_side = ask_once(["--role", "agreement"], options.vocabularies[0])
    for name, gaps in gaps_by_side.items():
        assert max(gaps.values()) <= AGREE, f"{name} computes something else: {gaps}"
    comparisons = {vocabulary: compare(vocabulary, options) for vocabulary in options.vocabularies}
    mib = [
        comparisons[size]["potstill"]["mib"] - HEAD_COPY * size / MIB for size in (min(comparisons), max(comparisons))
    ]
    figures = {
        "agreement": gaps_by_side,
        "vocabularies": comparisons,
        "growth": mib[1] / mib[0],
        "growth_mib": mib[1] - mib[0],
    }
    met = {
        "memory beyond heads and gradients flat, within 20 %": abs(figures["growth"] - 1) <= 0.2,
        "no more memory than TRL's at any vocabulary": max(
            comparison["share_of_memory"] for comparison in comparisons.values()
        )
        <= 1,
        "faster than TRL's at every vocabulary": min(comparison["times_faster"] for comparison in comparisons.values())
        > 1,
    }
    print(document("loss_memory", figures, met))


def compare(vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    """All sides at one vocabulary."""
    names = [name for name in LOSSES if name != "plain" or vocabulary <= options.plain_up_to]
    shared = ["--role", "side", "--vocabulary", str(vocabulary), *forward_flags(options, "cpu_seconds")]
    sides = {name: Side([*shared, "--side", name]) for name in names}
    replies: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(1 + options.rounds):
        for name, side in sides.items():
            replies[name].append(side.ask(number))
    for side in sides.values():
        side.close()
    figures: dict[str, Any] = {}
    for name, side_replies in replies.items():
        seconds = statistics.median(reply["seconds"] for reply in side_replies[1:])
        figures[name] = {"mib": side_replies[0]["beyond"] / MIB, "seconds": seconds, "loss": side_replies[0]["loss"]}
    figures["times_faster"] = figures["trl"]["seconds"] / figures["potstill"]["seconds"]
    figures["share_of_memory"] = figures["potstill"]["mib"] / figures["trl"]["mib"]
    print(vocabulary, figures, file=sys.stderr)
    return figures


def make_problem(vocabulary: int, *, rows: int = ROWS) -> Problem:
    """Rows and heads whose logits spread as a language model's do; the student's are the teacher's with noise."""
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


def compute_by_potstill(problem: Problem) -> torch.Tensor:
    """The objective over one document, as the training module calls it."""
    from potstill.core.types import Head, Signals
    from potstill.objectives.logit_distillation import LogitDistillation

    count = len(problem.rows)
    ids = torch.zeros(1, count + 1, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "documents": ids, "position_ids": torch.arange(count + 1)[None]}
    heads = Head(problem.weight), Head(problem.teacher_weight)
    student, teacher = (
        Signals(rows, head.logits, head) for rows, head in zip((problem.rows, problem.teacher_rows), heads, strict=True)
    )
    return LogitDistillation()({"student": student}, {"teacher": teacher}, batch)["distill"] / count


def compute_by_trl(problem: Problem) -> torch.Tensor:
    """The loss of TRL 1.16's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(problem.rows))
    rows, teacher_rows = problem.rows[None], problem.teacher_rows[None]
    loss: torch.Tensor = _chunked_divergence_loss(
        rows, teacher_rows, problem.weight, problem.teacher_weight, mask, beta=0.0
    )[0]
    return loss


def compute_by_definition(problem: Problem) -> torch.Tensor:
    """The loss from all logits at once, by autograd."""
    from potstill.core.types import Head
    from potstill.ops.fused import sum_row_losses_densely
    from potstill.ops.row_loss import DivergenceRows

    teacher, targets = Head(problem.teacher_weight), torch.zeros(len(problem.rows), dtype=torch.long)
    rows = problem.rows.to(torch.bfloat16)
    frozen = {"teacher": lambda start, stop: teacher.logits(problem.teacher_rows[start:stop])}
    return sum_row_losses_densely([DivergenceRows()], rows, Head(problem.weight), targets=targets, frozen=frozen)[
        0
    ] / len(rows)


LOSSES: dict[str, Callable[[Problem], torch.Tensor]] = {
    "potstill": compute_by_potstill,
    "trl": compute_by_trl,
    "plain": compute_by_definition,
}


def run_pass(loss: Callable[[Problem], torch.Tensor], problem: Problem) -> float:
    """Forward and backward; leaves the gradients in `problem`."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(problem)
    value.backward()
    return value.item()


def make_timer(side: str, vocabulary: int) -> Callable[[int], dict[str, float]]:
    """The child: one pass per question."""
    from potstill.core.memory import trim_memory

    loss = LOSSES[side]
    run_pass(loss, make_problem(64, rows=8))  # what libraries allocate once
    problem = make_problem(vocabulary)
    trim_memory()
    gradient_bytes = 4 * (problem.rows.numel() + problem.weight.numel())

    def answer(number: int) -> dict[str, float]:
        problem.rows.grad = problem.weight.grad = None
        before = resident_bytes()
        reset_peak()
        start = time.perf_counter()
        value = run_pass(loss, problem)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": value, "beyond": peak() - before - gradient_bytes}

    return answer


def measure_agreement(vocabulary: int) -> dict[str, dict[str, float]]:
    """The distance of potstill's loss and gradients from TRL's and the definition's, on the same tensors."""
    problem = make_problem(vocabulary)
    results: dict[str, dict[str, Any]] = {}
    for name, loss in LOSSES.items():
        problem.rows.grad = problem.weight.grad = None
        value = torch.tensor(run_pass(loss, problem))
        results[name] = {"loss": value, "rows": problem.rows.grad, "head": problem.weight.grad}
    potstill = results.pop("potstill")
    return {
        name: {what: relative_distance(potstill[what], other[what]) for what in potstill}
        for name, other in results.items()
    }


def relative_distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference|, as vectors."""
    return (torch.dist(value, reference) / reference.norm()).item()


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--rounds", type=int, default=2, help="timed passes of every side, after the first")
    parser.add_argument("--plain-up-to", type=int, default=2**16, help="the largest vocabulary of the plain definition")
    parser.add_argument("--role", choices=("side", "agreement"), help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    return parse_arguments(parser)


if __name__ == "__main__":
    main()
