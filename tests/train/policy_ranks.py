"""What the ranks of a policy gradient do, started by test_grouped_ranks.py as processes of their own."""

import os
import sys
from pathlib import Path

import torch
from tests.train.rollouts.policies import make_rollout, make_sampler, prompt_packs
from tests.train.small import settings
from transformers import LlamaForCausalLM

from potstill.objectives.grpo import GRPO
from potstill.train.run import train
from potstill.train.training_module import TrainingModule

VARIANTS = {
    "sequences": {"scale_rewards": "group", "updates": 2},
    "tokens": {"scale_rewards": "batch", "overlong": "drop"},
    "constant": {"scale_rewards": "none", "leave_one_out": True},
}


def main(model: Path, out: Path) -> None:
    """Train in float64 under each normalization and leave the weights of this rank in `out`."""
    torch.set_num_threads(1)
    weights = {}
    for normalization, options in VARIANTS.items():
        rollout = make_rollout(normalization=normalization, **options)
        rollout.validation = make_sampler(count=5)
        student = LlamaForCausalLM.from_pretrained(model, dtype=torch.float64)
        module = TrainingModule(student, GRPO(policy=rollout.sampler.policy))
        config = settings(tokens=4 * 64, context=16, eval_every=2)
        packs = prompt_packs(8)
        train(module, packs, config, out / normalization, validation=packs, rollout=rollout, show=False)
        weights[normalization] = student.state_dict()
    torch.save(weights, out / f"rank{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
