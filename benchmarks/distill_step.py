"""One distillation step compared with TRL's GKDTrainer: tokens/s, peak memory, share of the roofline.

Four sides: potstill with a live teacher; potstill with a cache of that teacher on the same documents; TRL; and the
floor, which runs only the matrix products of the live step (teacher and student, forward and backward) in their
shapes and in bf16. All use the same teacher (bf16), student (12 evenly chosen layers, fp32 weights, bf16 compute),
documents in every step and optimizer, and forward KL alone. Each side has a process of its own, so that its peak memory
is its own; the parent asks them for one step in turn. TRL runs without gradient checkpointing, which is faster and
larger than its default. potstill and the floor keep memory that they free, as a potstill run does; TRL runs as it is.
FLOPs counted: 2 per weight of every matrix and token, once for a live teacher and three times for the student, without
attention. The cache stores the top 64 and 16 classes, so its loss is a lower bound of the live one; the figures
show the gap.

    python benchmarks/distill_step.py --json           (needs: pip install 'potstill[bench]')
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from setting.document import command_line, document, refuse_on_red
from setting.memory import peak
from setting.pair import count_matrix_weights, load_pair
from setting.roofline import roofline
from setting.sides import ask_once, serve, take_turns
from setting.steps import Step, make_optimizer, make_potstill_step, make_trl_step
from setting.text import CONTEXT, load_documents, write_texts

RESTS_ON = [
    "tests/ops/test_fused.py",
    "tests/ops/test_attention.py",
    "tests/ops/test_coarse.py",
    "tests/stages/test_cache_teacher.py",
]
HEAD = (49152, 576)
SIDES = ("potstill", "cached", "floor", "trl")
TEXTS = "texts"
GOALS = {
    "losses agree within bf16 noise": "loss_gap <= 0.02",
    "five times TRL's tokens/s": "times_faster >= 5",
    "a third of TRL's memory": "share_of_memory <= 1/3",
    "at most 1.43 times its own products": "times_the_floor <= 1.43",
    "from a cache 1.6 times the live step": "cached_times_live >= 1.6",
    "from a cache six times TRL's tokens/s": "cached_times_trl >= 6",
}


def main() -> None:
    """The parent: refuses if a test fails, caches the teacher, lets the sides step in turn, prints one document."""
    options = parse_arguments()
    if options.side == "capture":
        serve(lambda: capture_cache)
        return
    if options.side:
        serve(lambda: make_stepper(options), retain_memory=options.side != "trl")
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    batches = load_documents(options.steps + options.warm_up, options.batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder) / TEXTS, sum(map(len, batches)))
        cached = ask_once(["--side", "capture"], folder)
        replies = take_turns(SIDES, batches, ["--seed", str(options.seed), "--folder", folder])
    print(report(replies, batches, cached, options))


def report(
    replies: dict[str, list[dict[str, float]]],
    batches: list[list[list[int]]],
    cached: dict[str, float],
    options: argparse.Namespace,
) -> str:
    """The figures, with ratios from the same run."""
    peak_flops, sizes = roofline(), count_matrix_weights()
    student = 2 * 3 * sizes["student"]
    live = student + 2 * sizes["teacher"]
    figures: dict[str, Any] = {
        "gemm_gflops": peak_flops / 1e9,
        "flops_per_token": live,
        "flops_per_token_cached": student,
        "cache": cached,
    }
    for side, side_replies in replies.items():
        timed = list(zip(side_replies, batches, strict=True))[options.warm_up :]
        rates = [sum(map(len, batch)) / reply["seconds"] for reply, batch in timed]
        rate = statistics.median(rates)
        figures[side] = {
            "tokens_per_second": rate,
            "range": [min(rates), max(rates)],
            "peak_gib": side_replies[-1]["peak"] / 2**30,
            "roofline": rate * (student if side == "cached" else live) / peak_flops,
            "losses": [reply["loss"] for reply in side_replies],
            "milliseconds_per_token": 1e3 / rate,
        }
    figures |= compare_sides(figures, replies, options.warm_up)
    met = {
        "losses agree within bf16 noise": figures["loss_gap"] <= 0.02,
        "five times TRL's tokens/s": figures["times_faster"] >= 5,
        "a third of TRL's memory": figures["share_of_memory"] <= 1 / 3,
        "at most 1.43 times its own products": figures["times_the_floor"] <= 1.43,
        "from a cache 1.6 times the live step": figures["cached_times_live"] >= 1.6,
        "from a cache six times TRL's tokens/s": figures["cached_times_trl"] >= 6,
    }
    return document("distill_step", figures, met, goals=GOALS)


def compare_sides(
    figures: dict[str, Any], replies: dict[str, list[dict[str, float]]], warm_up: int
) -> dict[str, float]:
    """Ratios between the sides."""
    live, cached, trl = (figures[name] for name in ("potstill", "cached", "trl"))
    timed = list(zip(replies["potstill"], replies["floor"], strict=True))[warm_up:]
    return {
        "times_faster": live["tokens_per_second"] / trl["tokens_per_second"],
        "share_of_memory": live["peak_gib"] / trl["peak_gib"],
        "loss_gap": largest_relative_gap(live["losses"], trl["losses"]),
        "times_the_floor": statistics.median(step["seconds"] / ask_once["seconds"] for step, ask_once in timed),
        "cached_times_live": cached["tokens_per_second"] / live["tokens_per_second"],
        "cached_times_trl": cached["tokens_per_second"] / trl["tokens_per_second"],
        "cached_share_of_memory": cached["peak_gib"] / trl["peak_gib"],
        "cached_loss_gap": largest_relative_gap(cached["losses"], trl["losses"]),
    }


def largest_relative_gap(live: list[float], trl: list[float]) -> float:
    """The largest relative difference between two sequences of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(live, trl, strict=True))


def capture_cache(folder: str) -> dict[str, float]:
    """The child that caches the teacher, as `potstill cache` does."""
    from potstill.stages.cache_teacher import CacheTeacherConfig

    start = time.perf_counter()
    stage = CacheTeacherConfig(teacher="smollm2", data=str(Path(folder) / TEXTS), context=CONTEXT, dtype="bfloat16")
    manifest = stage.run(Path(folder) / "cache", show=False)
    return {"rows": manifest.rows, "bytes": manifest.bytes, "seconds": time.perf_counter() - start}


def make_stepper(options: argparse.Namespace) -> Callable[[list[list[int]]], dict[str, float]]:
    """The child of one side: takes a step for every batch that it receives."""
    from potstill.teachers.cached import TeacherCache

    torch.manual_seed(options.seed)
    teacher, student = load_pair()
    if options.side == "floor":
        step = make_floor_step(teacher, student)
    else:
        signal_source = TeacherCache(Path(options.folder) / "cache") if options.side == "cached" else teacher
        step = (make_trl_step if options.side == "trl" else make_potstill_step)(
            signal_source, student, make_optimizer(student)
        )
    del teacher  # the side with a cache has none

    def answer(batch: list[list[int]]) -> dict[str, float]:
        start = time.perf_counter()
        loss = step(batch)
        return {"seconds": time.perf_counter() - start, "loss": loss, "peak": peak()}

    return answer


def make_floor_step(teacher: Any, student: Any) -> Step:
    """Every matrix product of a step, and nothing else; the head in chunks of rows, as the fused loss takes it."""
    from potstill.ops.fused import rows_per_chunk

    kinds = {
        name: [w.detach().bfloat16() for n, w in model.named_parameters() if w.ndim == 2 and "embed" not in n]
        for name, model in (("teacher", teacher), ("student", student))
    }
    head = torch.randn(HEAD, dtype=torch.bfloat16)

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.T

    def both(x: torch.Tensor, weight: torch.Tensor) -> None:
        y = forward(x, weight)
        y @ weight
        y.T @ x

    def step(batch: list[list[int]]) -> float:
        tokens, rows = sum(map(len, batch)), sum(len(document) - 1 for document in batch)
        inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], dtype=torch.bfloat16) for w in kinds["teacher"]}
        for weight in kinds["teacher"]:
            forward(inputs[weight.shape[1]], weight)
        for weight in kinds["student"]:
            both(inputs[weight.shape[1]], weight)
        for some in inputs[HEAD[1]][:rows].split(rows_per_chunk(HEAD[0])):
            forward(some, head)
            both(some, head)
        return 0.0

    return step


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens per step; TRL takes 11 MiB for each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--side", choices=(*SIDES, "capture"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
