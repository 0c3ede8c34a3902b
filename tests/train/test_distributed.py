"""Several processes train as one does."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.ranks import main
from transformers import LlamaForCausalLM

from potstill.core.errors import UsageError
from potstill.train import checkpoint, distributed
from potstill.train.run import read_run_metrics


def launch(module: str, *arguments: Path, ranks: int) -> None:
    """What torchrun does, without its agent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    ends = [(process.communicate(timeout=200)[1], process.returncode) for process in started]
    assert [code for _, code in ends] == [0] * ranks, "\n".join(error[-3000:] for error, _ in ends)


def numbers(folder: Path) -> list[dict[str, Any]]:
    own = ("seconds", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in line.items() if k not in own} for line in read_run_metrics(folder)]


@pytest.mark.slow
def test_two_processes_train_log_evaluate_and_resume_as_one_does(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model, one, two = tmp_path / "model", tmp_path / "one", tmp_path / "two"
    tiny_llama.double().save_pretrained(model)
    main(model, one)
    launch("tests.train.ranks", model, two, ranks=2)
    whole = torch.load(one / "rank0.pt", weights_only=False)
    halves = [torch.load(two / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    for name, weight in whole["weights"].items():
        assert torch.equal(halves[0]["weights"][name], halves[1]["weights"][name]), name
        torch.testing.assert_close(halves[0]["weights"][name], weight, rtol=1e-6, atol=1e-9)
    for kept in ("finished", "steps", "tokens"):
        assert halves[0]["outcome"][kept] == halves[1]["outcome"][kept] == whole["outcome"][kept]
    for alone, shared in zip(numbers(one), numbers(two), strict=True):
        assert shared == pytest.approx(alone, rel=1e-6)
    assert {f.name for f in (two / "checkpoint-4").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert checkpoint.find_fault(two / "checkpoint-4", run_id="", world_size=2) is None
    assert "written by 2 ranks" in str(checkpoint.find_fault(two / "checkpoint-4", run_id=""))

    shutil.rmtree(two / "checkpoint-4")  # back to step 2
    launch("tests.train.ranks", model, two, ranks=2)
    again = torch.load(two / "rank0.pt", weights_only=False)
    for name, weight in halves[0]["weights"].items():
        assert torch.equal(again["weights"][name], weight), name
    assert [line["step"] for line in read_run_metrics(two) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("which", distributed.SHARDING_SWITCHES)
def test_accelerate_is_not_left_to_share_weights_out_in_silence(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(distributed.SHARDING_SWITCHES[which], "true")
    with (
        pytest.raises(UsageError, match=f"shard the weights by {which}.*docs/scale.md"),
        distributed.process_group(),
    ):
        pass
