"""What `plan` predicts beside what runs take: peak memory, seconds of a step, most bytes on disk.

It predicts runs that it has not seen: other students, teachers, contexts, batches, objectives, adapters. Right before
each, a short rehearsal of one and the same pair calibrates it (with a live teacher, none, or a cached one, as the run
has it). Beside that stands what `potstill plan` says by default, from a few steps of the run's own configuration, and
what it says without any step. Each run is a whole `Distill.run` in a process of its own, whose peak resident set is its
own; a step's time is the median of all but the first three, in which kernels are made and memory is touched for the
first time, and the folder is watched while it is written. Students are cut from SmolLM2-135M without measuring what
matters: time and memory do not ask.

No prediction is right for a machine whose speed changes while it is held against it. So a large product is timed before
the calibration, before either run, and at the end; where its rates differ by more than a tenth, all of it is done
again, up to three times. Each run is made twice: a prediction is held against the mean of both, and how far they lie
apart stands among the figures.

    python benchmarks/plan.py --json
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setting.document import command_line, document, forward_flags, parse_arguments, refuse_on_red
from setting.memory import peak
from setting.roofline import roofline

RESTS_ON = ["tests/stages/resources/test_workload.py", "tests/stages/plan/test_plan.py"]
STEPS, WARM_UP, SAVE_EVERY, CLAIM = 12, 3, 5, 0.15
STEADY = 1.1  # the largest rate of a product by the smallest, for a comparison to be fair
SIZE, REPEATS = 3072, 20  # of that product, a square; it takes some three seconds
HOW = ("predicted", "own steps", "without steps")
BASE = {"teacher": "t30", "student": "s12", "context": 256, "batch_tokens": 512, "micro_tokens": 256}
CALIBRATE: dict[str, dict[str, Any]] = {
    "live": {},
    "alone": {"objective": "cross_entropy"},
    "cached": {"teacher_cache": "cache256"},
}
RUNS: dict[str, dict[str, Any]] = {
    "context 128, one pass": {"context": 128, "micro_tokens": 512},
    "context 512": {"context": 512, "batch_tokens": 1024, "micro_tokens": 512},
    "batch of 2048 in passes of 1024": {"batch_tokens": 2048, "micro_tokens": 1024},
    "student cut in all dimensions": {"student": "both50"},
    "student cut in width": {"student": "width60", "micro_tokens": 512},
    "student cut in neurons, context 128": {"student": "ffn70", "context": 128},
    "half a teacher, a student of 6 layers": {
        "teacher": "t15",
        "student": "s6",
        "batch_tokens": 1024,
        "micro_tokens": 512,
    },
    "no teacher in the loss": {"objective": "cross_entropy", "context": 128, "student": "s6", "micro_tokens": 512},
    "adapters of rank 16": {"lora": 16, "micro_tokens": 512},
    "from a cache": {"teacher_cache": "cache512", "context": 512, "batch_tokens": 1024, "micro_tokens": 1024},
}


def main() -> None:
    """The parent: refuses on a red test, calibrates, predicts, runs, prints one document."""
    options = arguments()
    if options.role:
        print(json.dumps({"plan": planned, "run": ran, "make": make}[options.role](json.loads(options.job), options)))
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    with tempfile.TemporaryDirectory() as folder:
        child("make", {"folder": folder}, options)
        found = {name: steadily(name, folder, one, options) for name, one in chosen(options)}
    print(report(found))


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs, or those whose number was given."""
    for number, (name, one) in enumerate(RUNS.items()):
        if not options.only or number in options.only:
            yield name, one


def steadily(name: str, folder: str, job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One run beside its predictions, in minutes in which the machine kept its speed, where there are such."""
    tries = []
    for _ in range(options.tries):
        tries.append(compare(folder, job, options))
        print(f"{name}: {tries[-1]}", file=sys.stderr)
        if tries[-1]["drift"] <= STEADY:
            break
    best = min(tries, key=lambda one: one["drift"])
    return {**best, "drift_of_tries": [one["drift"] for one in tries]}


def compare(folder: str, job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One run made twice, and predicted without a step, by a calibration made here and now, and by steps of its own."""
    job = {"folder": folder, **BASE, **job}
    kind = "cached" if "teacher_cache" in job else "alone" if job.get("objective") == "cross_entropy" else "live"
    unmeasured = child("plan", {**job, "measure": False}, options)
    rates = [roofline(SIZE, repeats=REPEATS)]
    calibration = child("plan", {"folder": folder, **BASE, **CALIBRATE[kind]}, options)["calibration"]
    measured = child("plan", {**job, "rates": calibration}, options)
    rates.append(roofline(SIZE, repeats=REPEATS))
    first = child("run", job, options)
    own = child("plan", job, options)
    rates.append(roofline(SIZE, repeats=REPEATS))
    second = child("run", job, options)
    rates.append(roofline(SIZE, repeats=REPEATS))
    return {
        "predicted": in_short(measured),
        "own steps": in_short(own),
        "without steps": in_short(unmeasured),
        "real": {what: (first[what] + second[what]) / 2 for what in ("memory", "seconds", "disk")},
        "each": [first, second],
        "apart": max(first["seconds"], second["seconds"]) / min(first["seconds"], second["seconds"]),
        "drift": max(rates) / min(rates),
        "gemm_gflops": [rate / 1e9 for rate in rates],
        "memory_parts": measured["memory"],
        "time_parts": measured["time"]["parts"],
        "calibration": calibration,
    }


def in_short(plan: dict[str, Any]) -> dict[str, float]:
    """Bytes, seconds and bytes."""
    return {
        "memory": plan["memory"]["peak"],
        "seconds": plan["time"]["seconds_per_step"],
        "disk": plan["disk"]["most"],
    }


def report(found: dict[str, Any]) -> str:
    """The figures, with the table on stderr."""
    units = {"memory": ("GiB", 2**30), "seconds": ("a step", 1), "disk": ("GiB", 2**30)}
    heads = (f"{what} {unit} | predicted, by its own steps, without steps" for what, (unit, _) in units.items())
    print("| run | " + " | ".join(heads) + " | seconds of both |", file=sys.stderr)
    print("|---" * 8 + "|", file=sys.stderr)
    for name, one in found.items():
        cells = [
            f"{one['real'][what] / size:.2f} | " + ", ".join(f"{off(one, what, how):+.0%}" for how in HOW)
            for what, (_, size) in units.items()
        ]
        cells.append(f"{one['apart']:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", file=sys.stderr)
    worst = {how: {what: max(abs(off(one, what, how)) for one in found.values()) for what in units} for how in HOW}
    met = {f"{what} within {CLAIM:.0%} on every run": error <= CLAIM for what, error in worst["predicted"].items()}
    own = worst["own steps"].items()
    met |= {f"{what} within {CLAIM:.0%} on every run, as plan says by default": error <= CLAIM for what, error in own}
    unmeasured = {what: [1 + off(one, what, "without steps") for one in found.values()] for what in units}
    met["without steps, memory within a quarter"] = all(0.75 <= ratio <= 1.25 for ratio in unmeasured["memory"])
    met["without steps, seconds within a factor of two"] = all(0.5 <= ratio <= 2 for ratio in unmeasured["seconds"])
    return document("plan", {"worst": worst, "runs": found}, met)


def off(one: dict[str, Any], what: str, how: str) -> float:
    """How far a prediction lies above what came."""
    return float(one[how][what] / one["real"][what]) - 1


def child(role: str, job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process answers; while it runs, its output folder is watched."""
    call = [sys.executable, __file__, "--role", role, "--job", json.dumps(job)]
    call += forward_flags(options, "cpu_seconds")
    work, most = Path(job["folder"]) / "work", 0
    shutil.rmtree(work, ignore_errors=True)
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        most = max(most, used(work))
        time.sleep(0.05)
    answer, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{role} of {job} failed:\n{errors[-2000:]}")
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return {**found, "disk": most} if role == "run" else found


def used(work: Path) -> int:
    """Bytes of what a run has written so far, in its folder and beside it, where things are staged."""
    total = 0
    for root, _, names in os.walk(work):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # it was moved meanwhile
                continue
    return total


def stage(job: dict[str, Any]) -> Any:
    """The run that a job describes."""
    from potstill.stages.distill.config import DistillConfig

    folder = Path(job["folder"])
    named: dict[str, Any] = {
        name: str(folder / job[name]) for name in ("teacher", "student", "teacher_cache") if name in job
    }
    options: dict[str, Any] = {
        "objective": "forward_kl",
        "cross_entropy": 0.5,
        "temperature": 1.0,
        "dtype": "bfloat16",
        "documents": 2,
    }
    options |= {"tokens": STEPS * job["batch_tokens"], "save_every": SAVE_EVERY, "data": str(folder / "text.jsonl")}
    return DistillConfig.from_options({**options, **job, **named})


def planned(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The child that plans: with rates, from them; without, by measured steps."""
    from potstill.stages.plan.plan import Plan
    from potstill.stages.resources.calibration import Calibration

    rates = Calibration.from_dict(job["rates"]) if "rates" in job else None
    return Plan(distill=stage(job), calibration=rates, measure=job.get("measure", True)).run(Path(job["folder"]))


def ran(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The child that runs."""
    from potstill.core.metrics_log import METRICS_FILE, read_metrics

    out = Path(job["folder"]) / "work" / "out"
    stage(job).run(out, overwrite=True, show=False)
    seconds = [line["seconds"] for line in read_metrics(out / METRICS_FILE) if "seconds" in line][WARM_UP:]
    return {"memory": peak(), "seconds": statistics.median(seconds), "range": [min(seconds), max(seconds)]}


def make(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The child that cuts models from SmolLM2 and caches its answers; text are the first docstrings of the library."""
    import torch

    from potstill.data.corpus import load_corpus
    from potstill.models import gguf, locate
    from potstill.models.families.registry import export_model, import_model
    from potstill.stages.cache_teacher import CacheTeacherConfig
    from potstill.transforms.apply import apply_transform
    from potstill.transforms.drop_layers import DropLayers, select_evenly
    from potstill.transforms.fit import fit_shape, get_dimensions
    from potstill.transforms.narrow import Narrow

    folder = Path(job["folder"])
    origin, tokenizer = (
        gguf.load_model(locate.get_packaged_path(), dtype=torch.float32),
        gguf.load_tokenizer(locate.get_packaged_path()),
    )
    whole = import_model(origin)

    def save(name: str, backbone: Any, dtype: torch.dtype = torch.float32) -> None:
        export_model(backbone, origin).to(dtype).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def drop(layers: int) -> Any:
        return apply_transform(DropLayers(select_evenly(len(whole.layers), layers)), whole)

    save("t30", whole, torch.bfloat16)
    save("t15", drop(15), torch.bfloat16)
    for layers in (12, 6):
        save(f"s{layers}", drop(layers))
    for name, strategy, keep in (("both50", "both", 0.5), ("width60", "width", 0.6), ("ffn70", "ffn", 0.7)):
        shape = fit_shape(whole.blueprint, keep=keep, dims=get_dimensions(whole.blueprint, strategy, keep))
        layers = drop(shape["layers"])
        units = {cut: (tuple(range(shape[cut])),) * shape["layers"] for cut in ("kv_heads", "ffn")}
        save(name, apply_transform(Narrow(units=units, hidden=tuple(range(shape["hidden"]))), layers))
    text = folder / "text.jsonl"
    rows = [row["text"] for row in load_corpus("stdlib").documents.take(600)]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    for context in (256, 512):
        CacheTeacherConfig(
            teacher=str(folder / "t30"), data=str(text), context=context, tokens=(STEPS + 1) * 1024, dtype="bfloat16"
        ).run(folder / f"cache{context}", show=False)
    return {"made": sorted(one.name for one in folder.iterdir())}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the runs to compare; for development alone")
    parser.add_argument("--tries", type=int, default=3, help="how often a run is compared, until the machine is steady")
    parser.add_argument("--role", choices=("plan", "run", "make"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parse_arguments(parser)


if __name__ == "__main__":
    main()
