"""Kills a tiny distillation and a tiny capture with SIGKILL, again and again, and compares what comes of them.

    python -m tests.faults.kill --times 20

Each run is killed once or twice, then resumed until it is done; it must leave the folder that an unbroken run leaves,
bit for bit but for times and memory, and nothing beside it. Half of the kills come at a moment drawn from the run's
measured length, the other half right before one of its operations on files, drawn from all that it does. The runs
are real processes, forked from one that has imported everything already.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}

import torch
from tests.stages.world import LINES, saved, written
from tests.tiny import byte_tokenizer, random_llama

from potstill.core.atomic_files import CARD_FILE, TRAINING_FOLDER, hash_file
from potstill.core.errors import OutputExists
from potstill.stages.cache_teacher import CacheTeacherConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.teachers import cache_writer
from potstill.train.config import TrainConfig
from potstill.train.run import silence_libraries

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
TIMES = ("seconds", "tokens_per_second", "peak_memory", "cost", "command")  # what two equal runs may differ in

Job = Callable[[Path, bool], Any]  # (out, resume)


@dataclass(frozen=True)
class Kill:
    """Where a run is to die: after so many seconds, or right before its n-th change of a file."""

    seconds: float = float("inf")
    change: int = 0

    def __str__(self) -> str:
        return f"before change {self.change}" if self.change else f"after {self.seconds:.2f} s"


def jobs(room: Path) -> dict[str, Job]:
    """A distillation of eight steps with as many checkpoints, and a capture of some shards."""
    speaks = byte_tokenizer()
    teacher = saved(room / "teacher", random_llama(speaks, context=512), speaks)
    text = written(room / "text.jsonl", LINES)
    settings = TrainConfig(tokens=8 * 128, context=64, batch_tokens=128, micro_tokens=64, save_every=1, eval_every=3)
    distil = DistillConfig(
        teacher=str(teacher), keep=0.755, data=str(text), settings=settings, dtype="float32", documents=2
    )
    cache = CacheTeacherConfig(teacher=str(teacher), data=str(text), context=64, top_k=8, classes=3, dtype="float32")
    cache_writer.PACKS_PER_SHARD = 8
    return {
        "distill": lambda out, resume: distill(distil, out, resume=resume, show=False),
        "cache": lambda out, resume: cache.run(out, resume=resume, show=False),
    }


def counting(room: Path, kill: Kill, log: Path | None = None) -> None:
    """Counts what this process changes in `room`, and ends it right before the change that `kill` names."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES):
            return
        if str(arguments[0]).startswith("/") and not str(arguments[0]).startswith(str(room)):
            return
        count += 1
        if count == kill.change:
            os.kill(os.getpid(), signal.SIGKILL)
        if log is not None:
            os.write(seen, b".")

    seen = os.open(log, os.O_CREAT | os.O_WRONLY) if log is not None else -1
    sys.addaudithook(hook)


def run(job: Job, out: Path, *, resume: bool, kill: Kill, log: Path | None = None) -> bool:
    """One process that does `job` until it is done or killed; whether it was killed.

    Raises: RuntimeError with its traceback if it failed by itself.
    """
    said = out.parent.with_suffix(".txt")
    if (child := os.fork()) == 0:
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
            counting(out.parent, kill, log)
            job(out, resume)
            code = 0
        except OutputExists:
            code = (
                0 if (out / CARD_FILE).exists() and not (out / TRAINING_FOLDER).exists() else 1
            )  # it was done already
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + kill.seconds
    while (state := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    if os.WIFSIGNALED(state[1]):
        return True
    if os.WEXITSTATUS(state[1]):
        raise RuntimeError(f"{out.name} failed:\n{said.read_text()}")
    return False


def contents(out: Path) -> dict[str, Any]:
    """What a finished folder holds, by name: hashes, and JSON without times; its README repeats the card."""
    found = {str(file.relative_to(out)): file for file in sorted(out.rglob("*")) if file.is_file()}
    return {name: None if name == "README.md" else _content(file) for name, file in found.items()}


def _content(file: Path) -> Any:
    if file.name == "metrics.jsonl":
        return [_timeless(json.loads(line)) for line in file.read_text().splitlines()]
    return _timeless(json.loads(file.read_text())) if file.name == CARD_FILE else hash_file(file)


def _timeless(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in TIMES}


def faults(out: Path, whole: Mapping[str, Any]) -> Iterator[str]:
    """How a folder differs from the `whole` one, and what lies beside it."""
    ours = contents(out)
    for name in sorted(ours.keys() | whole.keys()):
        if name not in ours or name not in whole:
            yield f"{name} is {'missing' if name in whole else 'left over'}"
        elif ours[name] != whole[name]:
            yield f"{name} differs"
    for beside in sorted(out.parent.iterdir()):
        if beside != out:
            yield f"{beside.name} lies beside it"


def kills(times: int, length: float, changes: int, chance: random.Random) -> list[Kill]:
    """Half of them spread over `length` seconds, the others over all `changes`, each at random in its own part."""
    by_time = (times + 1) // 2
    others = times - by_time
    moments = [Kill(seconds=length * (i + chance.random()) / by_time) for i in range(by_time)]
    return moments + [Kill(change=1 + int(changes * (i + chance.random()) / others)) for i in range(others)]


def rehearsed(job: Job, out: Path) -> tuple[dict[str, Any], float, int]:
    """What an unbroken run leaves, the seconds it takes, and how often it changes a file."""
    log = out.with_name(f"{out.name}.log")
    start = time.monotonic()
    out.parent.mkdir(parents=True)
    run(job, out, resume=False, kill=Kill(), log=log)
    return contents(out), time.monotonic() - start, log.stat().st_size


def main() -> None:
    """Kills, resumes, compares; a line for each run on stdout, and exit code 1 if any differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="runs of each job that are killed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--job", choices=("distill", "cache"), help="one of them; by default both")
    parser.add_argument("--every", action="store_true", help="kill before every change of a file instead, in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    silence_libraries()
    room = Path(tempfile.mkdtemp(prefix="faults-"))
    bad = 0
    try:
        for name, job in jobs(room).items():
            if options.job in (None, name):
                bad += tried(name, job, room, options)
    finally:
        shutil.rmtree(room)
    sys.exit(1 if bad else 0)


def tried(name: str, job: Job, room: Path, options: argparse.Namespace) -> int:
    """Runs one job as often as asked; how many came out otherwise than unbroken."""
    chance = random.Random(options.seed)
    whole, length, changes = rehearsed(job, room / f"{name}-whole" / name)
    print(f"{name}: unbroken {length:.2f} s, {changes} changes of files, {len(whole)} files", flush=True)
    plan = kills(options.times, length, changes, chance)
    if options.every:
        plan = [Kill(change=number) for number in range(1, changes + 1)]
    bad = 0
    for number, kill in enumerate(plan, 1):
        place = room / f"{name}-{number}"
        second = Kill(seconds=length * chance.random()) if chance.random() < 0.5 else Kill()
        died = [str(one) for one, hit in _killed(job, place / name, kill, second) if hit]
        found = list(faults(place / name, whole))
        bad += bool(found)
        print(
            f"{name} {number:3}: killed {' and '.join(died) or 'too late':36} {'; '.join(found) or 'identical'}",
            flush=True,
        )
        shutil.rmtree(place)
    print(f"{name}: {len(plan) - bad} of {len(plan)} identical", flush=True)
    return bad


def _killed(job: Job, out: Path, *planned: Kill) -> Iterator[tuple[Kill, bool]]:
    out.parent.mkdir()
    for number, kill in enumerate((*planned, Kill())):
        hit = run(job, out, resume=number > 0, kill=kill)
        yield kill, hit
        if not hit:
            return


if __name__ == "__main__":
    main()
