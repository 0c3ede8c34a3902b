"""What the ranks of a distributed run do, started by test_ranks.py as processes of their own (gloo, on a CPU)."""

import os
import sys
from pathlib import Path

import torch
from tests.train.small import settings, some_packs, study_of
from transformers import LlamaForCausalLM

from potstill.train.run import train


def main(model: Path, out: Path) -> None:
    """Train in float64 and leave the weights of this rank in `out`."""
    torch.set_num_threads(1)
    study = study_of(LlamaForCausalLM.from_pretrained(model, dtype=torch.float64))
    options = settings(tokens=4 * 128, batch_tokens=128, micro_tokens=64, eval_every=2, save_every=2, neftune=5.0)
    rows = some_packs().take(24)
    resume = (out / "metrics.jsonl").exists()
    done = train(study, rows, options, out, validation=some_packs(9, seed=4), resume=resume, show=False)
    rank = os.environ.get("RANK", "0")
    torch.save({"outcome": done.to_dict(), "weights": study.student.state_dict()}, out / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
