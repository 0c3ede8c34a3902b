"""`distill` under a launcher: two ranks do what one process does, end together, and go on where they stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from potstill.train.run import read_run_metrics

ROOT = Path(__file__).parents[2]
ALONE = (sys.executable,)
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2", "--cpu")
ACCELERATE = (*LAUNCH, "--mixed_precision", "no", "--dynamo_backend", "no")  # said, so that it does not ask or warn
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
OWN = ("seconds", "tokens_per_second", "peak_memory", "epoch")  # an epoch is rounded up to whole steps of all ranks


def started(launcher: tuple[str, ...], module: str, *options: str, **env: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return subprocess.Popen(
        [*launcher, "-m", module, *options],
        env=os.environ | shared | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def options(teacher: Path, text: Path, out: Path) -> list[str]:
    given = {"teacher": teacher, "keep": 0.755, "data": text, "out": out, "dtype": "float32", "documents": 2}
    given |= {"tokens": 1024, "context": 64, "batch-tokens": 128, "micro-tokens": 64, "save-every": 2, "eval-every": 4}
    given |= {"save-dtype": "float32"}  # else a last digit rounds to another bf16 number
    return ["distill", *(f"--{name}={value}" for name, value in given.items())]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in OWN} for line in read_run_metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        (TORCHRUN, []),
        (TORCHRUN, ["--lora=2"]),
        (TORCHRUN, ["--checkpoint-activations"]),
        (TORCHRUN, ["--shard"]),
        (ACCELERATE, []),
    ],
    ids=["torchrun", "adapters", "blocks computed twice", "sharded", "accelerate"],
)
def test_two_ranks_leave_the_folder_that_one_process_leaves(
    teacher: Path, text: Path, tmp_path: Path, launcher: tuple[str, ...], more: list[str]
) -> None:
    alone_options = [option for option in more if option != "--shard"]
    one, two = (
        started(start, "potstill", *options(teacher, text, tmp_path / name), *more_options, "--json")
        for start, name, more_options in ((ALONE, "one", alone_options), (launcher, "two", more))
    )
    (code, alone, error), (codes, shared, errors) = ended(one), ended(two)
    assert (code, codes) == (0, 0), error + errors
    for ours, theirs in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, weight in others.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)
    cards = [json.loads(said)["measures"] for said in (alone, shared)]  # one document, of rank 0
    assert cards[0]["before training"] == cards[1]["before training"]
    assert {f.name for f in (tmp_path / "one").iterdir()} == {f.name for f in (tmp_path / "two").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["--on-policy=0.5"], ["--on-policy=0.5", "--rollout=distillm"]], ids=["text", "gkd", "distillm"]
)
def test_ranks_that_are_told_to_end_save_and_go_on_to_the_same_bits(
    teacher: Path, text: Path, tmp_path: Path, more: list[str]
) -> None:
    whole = started(TORCHRUN, "potstill", *options(teacher, text, tmp_path / "whole"), *more)
    code, _, error = ended(whole)
    assert code == 0, error
    assert all(("rollout_documents" in line) == bool(more) for line in lines(tmp_path / "whole") if "loss" in line)
    out = tmp_path / "out"
    process = started(TORCHRUN, "potstill", *options(teacher, text, out), *more)
    log = out / "training" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    code, _, error = ended(process)
    assert code != 0
    assert error.count("--resume continues from there") == 1
    code, _, error = ended(started(ALONE, "potstill", *options(teacher, text, out), *more, "--resume"))
    assert code == 1
    assert "was written by 2 ranks, and this run has 1" in error
    code, _, error = ended(started(TORCHRUN, "potstill", *options(teacher, text, out), *more, "--resume"))
    assert code == 0, error
    assert lines(out) == lines(tmp_path / "whole")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert {f.name for f in tmp_path.iterdir()} == {"teacher", "text.jsonl", "whole", "out"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("another student", "rank 1 has another student than rank 0"),
        ("an error", "no room on rank 1"),
        ("death", "another rank ended without a message"),
    ],
)
def test_trouble_on_one_rank_ends_all_with_one_message(
    teacher: Path, text: Path, tmp_path: Path, trouble: str, said: str
) -> None:
    launcher = (*TORCHRUN, "--max-restarts", "0")
    process = started(launcher, "tests.stages.ranks", trouble, *options(teacher, text, tmp_path / "out"))
    code, _, error = ended(process)
    assert code != 0
    assert error.count("error: ") == error.count(said) == 1, error
    assert not list(tmp_path.glob(".out*"))
