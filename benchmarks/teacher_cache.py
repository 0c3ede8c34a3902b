"""Training from a cache compared with training live: bytes per row, the loss, its gradient, and the time of a step.

SmolLM2-135M in bf16 is the teacher, 12 of its layers are the student (fp32 weights, bf16 compute), with forward KL
alone and packs of 512 tokens of docstrings. Live and cached steps alternate in one process on the same batches. The
gradient is compared in float32 with a float32 teacher, with respect to the student's last hidden states and its head.

    python benchmarks/teacher_cache.py --json
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from setting.document import command_line, document, refuse_on_red
from setting.pair import load_pair
from setting.text import CONTEXT

RESTS_ON = ["tests/ops/test_coarse.py", "tests/teachers/test_cache_codec.py", "tests/stages/test_cache_teacher.py"]
PACKS = 3
COMPARED = 2  # batches whose loss and gradient are compared
SETTINGS: dict[str, dict[str, Any]] = {
    "top_k 64": {},
    "top_k 64, one class": {"classes": 1},
    "mass 0.999": {"mass": 0.999},
}


def main() -> None:
    """Captures, compares, steps, prints one document."""
    options = parse_arguments()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    from potstill.core.memory import retain_freed_memory

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in SETTINGS.items():
            figures[name] = compare(Path(folder) / name.replace(" ", "-"), settings, options)
        with retain_freed_memory():
            figures["step"] = time_steps(Path(folder) / "top_k-64", options)
    first, cut = figures["top_k 64"], figures["mass 0.999"]
    met = {
        "at most 200 bytes a row at k = 64": first["bytes_per_row"] <= 200,
        "at most 130 bytes a row where 0.999 of the mass is kept": cut["bytes_per_row"] <= 130,
        "a gradient of cosine 0.999 to the live one": min(first["cosine_rows"], first["cosine_head"]) >= 0.999,
        "a loss within 1 % of the live one": abs(first["loss"] - 1) <= 0.01,
        "at least 1.6 times the live step": figures["step"]["times_faster"] >= 1.6,
    }
    print(document("teacher_cache", figures, met))


def compare(folder: Path, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """What a cache loses on real text."""
    from potstill.core.types import Needs, supervised_positions
    from potstill.models.signals import compute_signals
    from potstill.ops.coarse import coarse_divergence_with_gradient
    from potstill.ops.divergence_gradient import forward_kl_with_gradient
    from potstill.stages.cache_teacher import CacheTeacherConfig
    from potstill.teachers.cached import TeacherCache

    stage = CacheTeacherConfig(teacher="smollm2", tokens=options.tokens, context=CONTEXT, dtype="bfloat16", **settings)
    manifest = stage.run(folder, show=False)
    cache, (teacher, student) = TeacherCache(folder), load_pair(torch.float32)
    cached_loss, live_loss = 0.0, 0.0
    sums: dict[str, list[float]] = {}
    for batch in load_batches(cache, COMPARED):
        needs = Needs(supervised_positions(batch)[0])
        with torch.no_grad():
            teacher_signals, student_signals = (
                compute_signals(model, batch, needs, vocabulary=len(cache.members)) for model in (teacher, student)
            )
            cached_signals = cache.signals(batch, needs)
            for start in range(0, len(teacher_signals.rows), 128):
                rows = slice(start, start + 128)
                logits = student_signals.logits(student_signals.rows[rows]).float()
                full = forward_kl_with_gradient(teacher_signals.logits(teacher_signals.rows[rows]).float(), logits)
                part = coarse_divergence_with_gradient(
                    forward_kl_with_gradient, cached_signals.logits(cached_signals.rows[rows]), logits
                )
                cached_loss, live_loss = cached_loss + part[0].sum().item(), live_loss + full[0].sum().item()
                assert student_signals.head is not None
                weight, features = student_signals.head.weight.float(), student_signals.rows[rows].float()
                projected = {"rows": [g @ weight for g in (full[1], part[1])]}
                projected["head"] = [g.T @ features for g in (full[1], part[1])]
                for name, (a, b) in projected.items():
                    products = sums.setdefault(name, [0.0, 0.0, 0.0])
                    for i, (x, y) in enumerate(((a, b), (a, a), (b, b))):
                        products[i] += (x * y).sum().item()
    cosines = {f"cosine_{name}": ab / (aa * bb) ** 0.5 for name, (ab, aa, bb) in sums.items()}
    size = {"bytes_per_row": manifest.bytes / manifest.rows, "tokens_per_row": manifest.ids / manifest.rows}
    classes = (folder / "classes.safetensors").stat().st_size
    return {
        **size,
        "shards_per_row": (manifest.bytes - classes) / manifest.rows,
        "loss": cached_loss / live_loss,
        **cosines,
    }


def time_steps(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Live and cached steps in turn."""
    from potstill.objectives.logit_distillation import LogitDistillation
    from potstill.teachers.cached import TeacherCache
    from potstill.train.training_module import TrainingModule

    cache, (teacher, student) = TeacherCache(folder), load_pair(torch.bfloat16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    times: dict[str, list[float]] = {"live": [], "cached": []}
    modules = {
        name: TrainingModule(
            student,
            LogitDistillation(),
            frozen={"teacher": source},
            vocabulary=len(cache.members),
            compute_dtype=torch.bfloat16,
        )
        for name, source in (("live", teacher), ("cached", cache))
    }
    for batch in load_batches(cache, options.batches):
        for name, module in modules.items():
            start = time.perf_counter()
            module(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(batch["input_ids"].numel() / (time.perf_counter() - start))
    rates = {f"{name}_tokens_per_second": statistics.median(side_rates[1:]) for name, side_rates in times.items()}
    return {**rates, "times_faster": rates["cached_tokens_per_second"] / rates["live_tokens_per_second"]}


def load_batches(cache: Any, number: int) -> list[dict[str, torch.Tensor]]:
    """The first packs of the cached text."""
    from potstill.data.packing import collate
    from potstill.stages.dataset import load_tokenizer, prepare_dataset
    from potstill.stages.dataset_config import DatasetConfig

    packs = prepare_dataset(
        DatasetConfig(data="stdlib", context=CONTEXT), load_tokenizer("smollm2"), tokens=1, caches=[cache]
    ).packs
    return [collate([packs[i] for i in range(n * PACKS, (n + 1) * PACKS)]) for n in range(number)]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, default=30_000, help="tokens to capture")
    parser.add_argument("--batches", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
