"""What distillation costs on one GPU and on a thousand: a model of time, network, storage and stragglers.

Measured here: how much the work of packs of real text differs, for SmolLM2's matrices and attention over docstrings in
packs of 512. Measured by benchmarks/teacher_cache.py: the bytes of a cached row. `ASSUMED` names what a GPU, a link and
a disk do. Nothing in the table was run on a GPU.

    python benchmarks/scale.py            (the tables of docs/scale.md)
    python benchmarks/scale.py --json
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from setting.document import command_line, document, refuse_on_red

RESTS_ON = ["tests/data/test_packing.py", "tests/evaluate/test_size.py"]
ASSUMED = {
    "gpu_flops": 989e12,  # bf16 without sparsity, NVIDIA's figure for an H100 SXM
    "utilisation": 0.4,  # of it, in forward and backward alike
    "node_gpus": 8,
    "node_link": 450e9,  # bytes/s of a GPU within a node, each way (NVLink 4)
    "network": 50e9,  # bytes/s of a GPU between nodes, each way (400 Gb/s)
    "storage": 2e9,  # bytes/s of a node to or from shared storage
    "gpu_hours_to_failure": 50_000,  # Llama 3 herd: 419 unplanned stops of 16,384 GPUs in 54 days (arXiv:2407.21783)
    "dollars_gpu_hour": 2.0,
    "dollars_terabyte_month": 20.0,
}
ROW = 131  # bytes of a cached row at k = 64, measured by benchmarks/teacher_cache.py


@dataclass(frozen=True)
class Job:
    """A teacher and a student, in parameters, and the tokens to train on; `step` is the tokens of one step."""

    name: str
    teacher: float
    student: float
    tokens: float
    step: float = 4 * 2**20


JOBS = (
    Job("1.7B to 0.36B", 1.7e9, 0.36e9, 1e11),
    Job("8B to 1B", 8e9, 1e9, 1e12),
    Job("70B to 8B", 70e9, 8e9, 1e13),
)


def flops(job: Job) -> tuple[float, float]:
    """Per token, of the teacher (2 N: forward) and of the student (6 N: forward, and twice that backward)."""
    return 2 * job.teacher, 6 * job.student


def seconds_of(flops_per_token: float, tokens: float, gpus: int) -> float:
    """The time of the computation alone, spread evenly."""
    return flops_per_token * tokens / (gpus * ASSUMED["gpu_flops"] * ASSUMED["utilisation"])


def ring_share(gpus: int) -> float:
    """The share of a tensor that a rank sends in a reduce-scatter or an all-gather; an all-reduce is one of each."""
    return (gpus - 1) / gpus


def bytes_per_step(job: Job, gpus: int, *, sharded: bool) -> float:
    """Bytes a rank sends per step: DDP all-reduces fp32 gradients; FSDP2 gathers weights twice and reduces once."""
    return ring_share(gpus) * 4 * job.student * (3 if sharded else 2)


def bandwidth(gpus: int) -> float:
    """The bandwidth of the slowest link in the ring."""
    return ASSUMED["node_link"] if gpus <= ASSUMED["node_gpus"] else ASSUMED["network"]


def compute_row(job: Job, gpus: int, slowest: Mapping[int, float]) -> dict[str, Any]:
    """One row of the table: how long a job takes, and what takes the time. Nothing overlaps."""
    teacher, student = flops(job)
    waiting = slowest[gpus] - 1
    live = seconds_of(teacher + student, job.tokens, gpus)
    cached = seconds_of(student, job.tokens, gpus)
    steps = job.tokens / job.step
    network = steps * bytes_per_step(job, gpus, sharded=True) / bandwidth(gpus)
    checkpoint = 12 * job.student
    write = checkpoint / (ASSUMED["storage"] * math.ceil(gpus / ASSUMED["node_gpus"]))
    failure = ASSUMED["gpu_hours_to_failure"] * 3600 / gpus
    return {
        "job": job.name,
        "gpus": gpus,
        "days_live": (live * (1 + waiting) + network) / 86400,
        "days_cached": (cached * (1 + waiting) + network) / 86400,
        "teacher_share": teacher / (teacher + student),
        "network_share": network / (live * (1 + waiting) + network),
        "network_share_cached": network / (cached * (1 + waiting) + network),
        "waiting_share": waiting / (1 + waiting),
        "cache_read_mb_per_second": ROW * job.tokens / cached / 1e6,
        "checkpoint_gb": checkpoint / 1e9,
        "checkpoint_seconds": write,
        "checkpoint_every_minutes": math.sqrt(2 * write * failure) / 60,  # Young, 1974 (doi:10.1145/361147.361115)
    }


def compare_cache_cost(job: Job) -> dict[str, float]:
    """The cost of one teacher pass and its storage, compared with a live teacher in every run."""
    teacher, student = flops(job)
    hour = ASSUMED["dollars_gpu_hour"]
    once = seconds_of(teacher, job.tokens, 1) / 3600 * hour
    month = ROW * job.tokens / 1e12 * ASSUMED["dollars_terabyte_month"]
    return {
        "cache_terabytes": ROW * job.tokens / 1e12,
        "teacher_pass_dollars": once,
        "storage_dollars_month": month,
        "months_that_a_pass_pays": once / month,
        "times_faster_from_cache": (teacher + student) / student,
    }


def break_even_teacher() -> float:
    """Parameters of the teacher whose pass costs as much as a month of storing its outputs."""
    a_flop = ASSUMED["dollars_gpu_hour"] / 3600 / (ASSUMED["gpu_flops"] * ASSUMED["utilisation"])
    return ROW / 1e12 * ASSUMED["dollars_terabyte_month"] / (2 * a_flop)


def measure_pack_work(tokens: int) -> np.ndarray:
    """Relative work of packs of real text: SmolLM2's matrices per token, and attention within documents."""
    from potstill.data.corpus import load_corpus
    from potstill.data.packing import pack
    from potstill.data.tokenize import tokenize_corpus
    from potstill.evaluate.size import forward_flops
    from potstill.models.families.registry import import_model
    from potstill.models.load import load_model

    loaded = load_model("smollm2")
    blueprint = import_model(loaded.model).blueprint
    base = forward_flops(blueprint, 0).total
    slope = forward_flops(blueprint, 1).total - base
    packs = pack(tokenize_corpus(load_corpus("stdlib"), loaded.tokenizer, limit=tokens), length=512, seed=1)
    lengths = (packs[i]["lengths"].double() for i in range(len(packs)))
    return np.array([float((n * base + slope * n * (n - 1) / 2).sum()) for n in lengths])


def expected_slowest(work: Sequence[float] | np.ndarray, gpus: int, packs: int, *, draws: int = 2000) -> float:
    """Expected work of the slowest of `gpus` ranks with `packs` packs per step, over the mean; drawn with seed 1."""
    chance = np.random.default_rng(1)
    each = [chance.choice(work, (gpus, packs)).sum(1).max() for _ in range(max(50, draws // gpus))]
    return float(np.mean(each) / (packs * np.mean(work)))


def compute_tables(work: np.ndarray) -> dict[str, Any]:
    """Everything that docs/scale.md shows."""
    spread = {f"{gpus} ranks, {packs} packs": expected_slowest(work, gpus, packs) for gpus, packs in SHARES}
    slowest = {gpus: expected_slowest(work, gpus, 8) if gpus > 1 else 1.0 for gpus in GPUS}
    return {
        "assumed": ASSUMED,
        "measured": {
            "packs": len(work),
            "coefficient_of_variation": float(work.std() / work.mean()),
            "smallest_over_mean": float(work.min() / work.mean()),
            "largest_over_mean": float(work.max() / work.mean()),
            "slowest_over_mean": spread,
        },
        "runs": [compute_row(job, gpus, slowest) for job in JOBS for gpus in GPUS],
        "caches": {job.name: compare_cache_cost(job) for job in JOBS},
        "teacher_whose_pass_costs_a_month_of_storage": break_even_teacher(),
    }


GPUS = (1, 8, 64, 1000)
SHARES = tuple((gpus, packs) for gpus in (2, 8, 64, 1000) for packs in (1, 8, 64))


def format_tables(tables: Mapping[str, Any]) -> Iterator[str]:
    """The same as Markdown tables."""
    columns = list(tables["runs"][0])
    yield "| " + " | ".join(name.replace("_", " ") for name in columns) + " |"
    yield "|" + "---|" * len(columns)
    for run in tables["runs"]:
        yield "| " + " | ".join(_format_value(run[name]) for name in columns) + " |"
    for part in ("measured", "caches", "teacher_whose_pass_costs_a_month_of_storage"):
        yield f"\n{part}: " + json.dumps(tables[part], indent=1)


def _format_value(value: Any) -> str:
    return str(value) if not isinstance(value, float) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main() -> None:
    """Measures the packs and prints the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens of text to pack")
    options = parser.parse_args()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    tables = compute_tables(measure_pack_work(options.tokens))
    print(document("scale", tables, {}) if options.json else "\n".join(format_tables(tables)))


if __name__ == "__main__":
    main()
