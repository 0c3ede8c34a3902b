"""ULD beside TRL's: CPU seconds a row, peak memory, and whether both give one loss and one gradient.

Both get the same last hidden states and heads, in float32, of the sizes of SmolLM2-135M (49,152 ids, width 576) and, as
the teacher, of Gemma 3 270M (262,144 ids, width 640) or of SmolLM2-135M itself; logits have a standard deviation of 3.
They give the loss and its gradient by the student's states and head. TRL is its ULDLoss (GOLDTrainer) without its
cross-entropy and without span merging, after the heads' products; the goals are for the losses alone, without them.
Each side runs in a process of its own, which says by how much its memory grew at most.

    python benchmarks/uld.py --json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from setting.document import command_line, document, refuse_on_red

RESTS_ON = ["tests/ops/test_uld.py", "tests/ops/test_fused.py"]
STUDENT = (49_152, 576)
TEACHERS = {"of another family": (262_144, 640), "of its own": (49_152, 576)}
ROWS = {
    "of another family": 256,
    "of its own": 1024,
}  # supervised rows of either side; TRL holds 7 GiB for 1024 of 262k
SPREAD = 3.0  # of the logits
Computed = Callable[[], tuple[Tensor, Tensor, Tensor]]  # the loss and its gradient by states and head


def main() -> None:
    """Runs both sides for every teacher, prints one document."""
    options = arguments()
    if options.side:
        serve(options)
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    figures = {name: compare(name, options) for name in TEACHERS}
    met = {
        "at least 3 times faster than TRL": min(found["times_faster"] for found in figures.values()) >= 3,
        "a third of TRL's memory": max(found["share_of_memory"] for found in figures.values()) <= 1 / 3,
        "the same loss within 0.1 %": max(found["loss_difference"] for found in figures.values()) <= 1e-3,
        "nearly the same gradient, a cosine of 0.99": min(found["cosine"] for found in figures.values()) >= 0.99,
    }
    print(document("uld", figures, met))


def compare(teacher: str, options: argparse.Namespace) -> dict[str, float]:
    """Both sides and the products alone, each in a process of its own."""
    found, gradients = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("potstill", "trl", "products"):
            kept = Path(folder) / side
            command = [sys.executable, __file__, "--side", side, "--teacher", teacher, "--kept", str(kept)]
            command += ["--share", str(options.share), "--repeats", str(options.repeats)]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[side], gradients[side] = json.loads(answer.splitlines()[-1]), torch.load(kept)
    ours, theirs, products = found["potstill"], found["trl"], found["products"]["seconds"]
    cosines = (
        torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()
        for a, b in zip(gradients["potstill"], gradients["trl"], strict=True)
    )
    row = 1000 / rows_of(teacher, options)
    return {
        "potstill_ms_per_row": row * ours["seconds"],
        "trl_ms_per_row": row * theirs["seconds"],
        "potstill_loss_ms_per_row": row * (ours["seconds"] - products),
        "trl_loss_ms_per_row": row * (theirs["seconds"] - products),
        "potstill_mib": ours["bytes"] / 2**20,
        "trl_mib": theirs["bytes"] / 2**20,
        "times_faster": (theirs["seconds"] - products) / (ours["seconds"] - products),
        "times_faster_with_products": theirs["seconds"] / ours["seconds"],
        "share_of_memory": ours["bytes"] / theirs["bytes"],
        "loss_difference": abs(ours["loss"] / theirs["loss"] - 1),
        "cosine": min(cosines),
    }


def serve(options: argparse.Namespace) -> None:
    """The child: CPU seconds (the best), loss and growth of memory of one side, and its gradients in a file."""
    torch.manual_seed(0)
    student, teacher = (sized(size, rows_of(options.teacher, options)) for size in (STUDENT, TEACHERS[options.teacher]))
    compute = {"potstill": potstill, "trl": trl, "products": products}[options.side](student, teacher)
    for part in student:
        part.requires_grad_()
    before, seconds = reset_peak(), []
    for _ in range(options.repeats):
        start = time.process_time()
        loss, *gradients = compute()
        seconds.append(time.process_time() - start)
    grown = status("VmHWM") - before
    torch.save(gradients, options.kept)
    print(json.dumps({"seconds": min(seconds), "loss": loss.item(), "bytes": grown}))


def rows_of(teacher: str, options: argparse.Namespace) -> int:
    """How many rows are compared with this teacher."""
    return int(options.share * ROWS[teacher])


def sized(size: tuple[int, int], rows: int) -> tuple[Tensor, Tensor]:
    """Random hidden states and a head."""
    tokens, width = size
    return SPREAD * torch.randn(rows, width) / width**0.5, torch.randn(tokens, width)


def potstill(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Computed:
    """In chunks of rows, without sorting."""
    from potstill.ops.fused import sum_row_losses
    from potstill.ops.uld import ULDRows

    (rows, weight), (states, head) = student, teacher
    nobody = torch.zeros(len(rows), dtype=torch.long)

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        said = {"teacher": lambda a, b: states[a:b] @ head.mT}
        with torch.enable_grad():
            (total,) = sum_row_losses(
                [ULDRows()], rows, (weight, None, 1.0, None), targets=nobody, frozen=said, mix=[1.0]
            )
            by_rows, by_head = torch.autograd.grad(total / len(rows), (rows, weight))
        return (total / len(rows)).detach(), by_rows, by_head

    return compute


def trl(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Computed:
    """All logits, then GOLDTrainer's loss."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gold.gold_trainer import ULDLoss

    settings = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="observed",
    )
    criterion: Any = ULDLoss(settings)
    (rows, weight), (states, head) = student, teacher
    labels = torch.zeros(1, len(rows), dtype=torch.long)

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            said = (states @ head.mT)[None]
        loss = criterion((rows @ weight.mT)[None], said, labels, labels, labels, labels)
        by_rows, by_head = torch.autograd.grad(loss, (rows, weight))
        return loss.detach(), by_rows, by_head

    return compute


def products(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Computed:
    """What both sides have to multiply, and no loss."""
    (rows, weight), (states, head) = student, teacher

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        states @ head.mT
        logits = rows @ weight.mT
        return logits[0, 0].detach(), *torch.autograd.grad(logits, (rows, weight), logits.detach())

    return compute


def reset_peak() -> int:
    """The bytes that this process holds now, from which on its peak counts (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(key: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the rows; less is faster and says less of memory")
    parser.add_argument("--repeats", type=int, default=2)
    for own in ("--side", "--teacher", "--kept"):
        parser.add_argument(own, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
