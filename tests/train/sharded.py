"""What the ranks of a sharded run do (FSDP2 over gloo on a CPU); started by test_fsdp.py, and used by it alone."""

import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tests.tiny import byte_tokenizer, random_llama
from tests.train.small import settings, some_packs, study_of

from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.model_info import ModelInfo, PairInfo
from potstill.train.config import TrainConfig
from potstill.train.distributed import barrier, is_main_process, process_group
from potstill.train.run import train
from potstill.train.trainer import Trainer
from potstill.train.training_module import TrainingModule

CASES = ("tied", "untied", "checkpoint_activations", "dskd")  # the last one trains weights of its objective too


def build(case: str, *, shard: bool, seed: int = 0) -> tuple[TrainingModule, TrainConfig]:
    """Always the same module of a case, in float64, and its config; `seed` draws the weights of its objective."""
    tokenizer = byte_tokenizer()
    student = random_llama(tokenizer, tied=case != "untied").double()
    config = settings(tokens=4 * 128, batch_tokens=128, micro_tokens=32, eval_every=2, save_every=2, shard=shard)
    if case == "dskd":
        teacher = random_llama(tokenizer, tied=False).double()
        pair = PairInfo(ModelInfo(student, tokenizer), ModelInfo(teacher, tokenizer))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            objective = ObjectiveConfig(name="dskd").build(pair)
        return TrainingModule(student, objective.double(), frozen={"teacher": teacher}), config
    return study_of(student), replace(config, checkpoint_activations=case == "checkpoint_activations")


def run(case: str, out: Path, *, shard: bool) -> dict[str, Any]:
    """Trains a case to its end, and again from the checkpoint in its middle."""
    packs, validation = some_packs().take(24), some_packs(7, seed=4)  # seven documents: ranks differ in batches
    found: dict[str, Any] = {}
    sizes: list[int] = []
    evaluate = Trainer.evaluate

    def evaluate_and_count(trainer: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        sizes.append(local(trainer))
        return evaluate(trainer, *args, **kwargs)

    Trainer.evaluate = evaluate_and_count  # type: ignore[method-assign]
    for seed, name in enumerate(("weights", "resumed")):  # the checkpoint has the weights of the objective
        module, config = build(case, shard=shard, seed=seed)
        folder = out / case
        if name == "resumed":
            barrier()
            if is_main_process():
                shutil.rmtree(folder / "checkpoint-4")
            barrier()
        result = train(module, packs, config, folder, validation=validation, resume=name == "resumed", show=False)
        found[name] = {key: weight.clone() for key, weight in module.student.state_dict().items()}
        found["result"] = asdict(result)
    Trainer.evaluate = evaluate  # type: ignore[method-assign]
    return found | {"local": max(sizes)}


def local(trainer: Any) -> int:
    """How many weights this rank holds between two steps."""
    weights = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    return sum((weight.to_local() if hasattr(weight, "to_local") else weight).numel() for weight in weights)


def main(out: Path) -> None:
    """Runs every case and leaves what came of it."""
    torch.set_num_threads(1)
    with process_group():
        found = {case: run(case, out, shard=True) for case in CASES}
        torch.save(found, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
