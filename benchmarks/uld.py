"""ULD compared with TRL's: CPU seconds per row, peak memory, and whether both give the same loss and gradient.

Both get the same last hidden states and heads in float32. The sizes are those of SmolLM2-135M (49,152 ids, width 576)
and, as the teacher, of Gemma 3 270M (262,144 ids, width 640) or SmolLM2-135M itself; logits have a standard deviation
of 3. Both compute the loss and its gradient by the student's states and head. TRL is its ULDLoss (GOLDTrainer)
without cross-entropy and span merging, after the heads' products; the goals are for the losses without products. Each
side runs in its own process and reports how much its memory grew at most.

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
    options = parse_arguments()
    if options.side:
        serve(options)
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    figures = {name: compare(name, options) for name in TEACHERS}
    met = {
        "at least 3 times faster than TRL": min(figure["times_faster"] for figure in figures.values()) >= 3,
        "a third of TRL's memory": max(figure["share_of_memory"] for figure in figures.values()) <= 1 / 3,
        "the same loss within 0.1 %": max(figure["loss_difference"] for figure in figures.values()) <= 1e-3,
        "nearly the same gradient, a cosine of 0.99": min(figure["cosine"] for figure in figures.values()) >= 0.99,
    }
    print(document("uld", figures, met))


def compare(teacher: str, options: argparse.Namespace) -> dict[str, float]:
    """Both sides and the products alone, each in its own process."""
    results, gradients = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("potstill", "trl", "products"):
            gradients_file = Path(folder) / side
            command = [
                sys.executable,
                __file__,
                "--side",
                side,
                "--teacher",
                teacher,
                "--gradients-file",
                str(gradients_file),
            ]
            command += ["--share", str(options.share), "--repeats", str(options.repeats)]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            results[side], gradients[side] = json.loads(answer.splitlines()[-1]), torch.load(gradients_file)
    potstill, trl, products = results["potstill"], results["trl"], results["products"]["seconds"]
    cosines = (
        torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()
        for a, b in zip(gradients["potstill"], gradients["trl"], strict=True)
    )
    row = 1000 / count_rows(teacher, options)
    return {
        "potstill_ms_per_row": row * potstill["seconds"],
        "trl_ms_per_row": row * trl["seconds"],
        "potstill_loss_ms_per_row": row * (potstill["seconds"] - products),
        "trl_loss_ms_per_row": row * (trl["seconds"] - products),
        "potstill_mib": potstill["bytes"] / 2**20,
        "trl_mib": trl["bytes"] / 2**20,
        "times_faster": (trl["seconds"] - products) / (potstill["seconds"] - products),
        "times_faster_with_products": trl["seconds"] / potstill["seconds"],
        "share_of_memory": potstill["bytes"] / trl["bytes"],
        "loss_difference": abs(potstill["loss"] / trl["loss"] - 1),
        "cosine": min(cosines),
    }


def serve(options: argparse.Namespace) -> None:
    """The child: CPU seconds (the best), loss and growth of memory of one side; its gradients go to a file."""
    torch.manual_seed(0)
    student, teacher = (
        make_inputs(size, count_rows(options.teacher, options)) for size in (STUDENT, TEACHERS[options.teacher])
    )
    compute = {"potstill": make_potstill, "trl": make_trl, "products": make_products}[options.side](student, teacher)
    for part in student:
        part.requires_grad_()
    before, seconds = reset_peak(), []
    for _ in range(options.repeats):
        start = time.process_time()
        loss, *gradients = compute()
        seconds.append(time.process_time() - start)
    growth = read_status("VmHWM") - before
    torch.save(gradients, options.gradients_file)
    print(json.dumps({"seconds": min(seconds), "loss": loss.item(), "bytes": growth}))


def count_rows(teacher: str, options: argparse.Namespace) -> int:
    """The number of rows to compare with this teacher."""
    return int(options.share * ROWS[teacher])


def make_inputs(size: tuple[int, int], rows: int) -> tuple[Tensor, Tensor]:
    """Random hidden states and a head."""
    tokens, width = size
    return SPREAD * torch.randn(rows, width) / width**0.5, torch.randn(tokens, width)


def make_potstill(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Computed:
    """potstill's loss: in chunks of rows, without sorting."""
    from potstill.ops.fused import sum_row_losses
    from potstill.ops.uld import ULDRows

    (rows, weight), (states, head) = student, teacher
    targets = torch.zeros(len(rows), dtype=torch.long)

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        teacher_logits = {"teacher": lambda a, b: states[a:b] @ head.mT}
        with torch.enable_grad():
            (total,) = sum_row_losses(
                [ULDRows()], rows, (weight, None, 1.0, None), targets=targets, frozen=teacher_logits, mix=[1.0]
            )
            by_rows, by_head = torch.autograd.grad(total / len(rows), (rows, weight))
        return (total / len(rows)).detach(), by_rows, by_head

    return compute


def make_trl(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Computed:
    """TRL's loss: all logits, then GOLDTrainer's loss."""
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
            teacher_logits = (states @ head.mT)[None]
        loss = criterion((rows @ weight.mT)[None], teacher_logits, labels, labels, labels, labels)
        by_rows, by_head = torch.autograd.grad(loss, (rows, weight))
        return loss.detach(), by_rows, by_head

    return compute


def make_products(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Computed:
    """The products that both sides need, without a loss."""
    (rows, weight), (states, head) = student, teacher

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        states @ head.mT
        logits = rows @ weight.mT
        by_rows, by_head = torch.autograd.grad(logits, (rows, weight), logits.detach())
        return logits[0, 0].detach(), by_rows, by_head

    return compute


def reset_peak() -> int:
    """Resets this process's peak memory; returns the bytes that are resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return read_status("VmRSS")


def read_status(key: str) -> int:
    """Bytes of `key`, as the kernel counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the rows; less is faster and less precise about memory"
    )
    parser.add_argument("--repeats", type=int, default=2)
    for option in ("--side", "--teacher", "--gradients-file"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
