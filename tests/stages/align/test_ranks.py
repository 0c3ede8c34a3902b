"""`align` under a launcher: two ranks compute the losses and gradients of one process, and leave its weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.test_ranks import ALONE, TORCHRUN, ended, lines, started
from tests.stages.world import written

SHARED = {"context": 64, "micro-tokens": 64, "dtype": "float32", "save-dtype": "float32", "documents": 4, "lr": 1e-3}
OBJECTIVES = {
    "dpo:nll=0.1": {"batch-tokens": 256, "tokens": 1024},
    "grpo:updates=2": {"prompts-per-step": 4, "epochs": 0.3, "reward": "accuracy", "samples": 4, "max-tokens": 5},
}


def write_data(objective: str, file: Path) -> Path:
    """Preferences, or prompts with answers that a random model hits at times."""
    if objective.startswith("dpo"):
        rows = [{"prompt": f"{n}?", "chosen": "Yes." if n % 2 else "No.", "rejected": f"{n}"} for n in range(60)]
    else:
        rows = [{"prompt": f"{n}+1?", "answer": str(n % 10)} for n in range(40)]
    return written(file, rows)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_align_as_one_process_does(objective: str, teacher: Path, tmp_path: Path) -> None:
    values = {"objective": objective, "data": write_data(objective, tmp_path / "data.jsonl"), **SHARED}
    given = [f"--{name}={value}" for name, value in (values | OBJECTIVES[objective]).items()]
    calls = {"one": ALONE, "two": TORCHRUN}
    for name, launcher in calls.items():
        code, _, error = ended(started(launcher, "potstill", "align", str(teacher), *given, f"--out={tmp_path / name}"))
        assert code == 0, error
    alone, shared = (lines(tmp_path / name) for name in calls)
    assert len([line for line in alone if "loss" in line]) >= 3
    assert any(line["grad_norm"] > 0 for line in alone)
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, weight in others.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)
