"""Studies, packs and settings small enough for whole runs in a test."""

from typing import Any

import torch
from transformers import LlamaForCausalLM

from potstill.core.types import Objective
from potstill.data.packing import Packs, pack
from potstill.data.token_dataset import TokenizedDocument
from potstill.objectives.config import ObjectiveConfig
from potstill.train.config import TrainConfig
from potstill.train.training_module import TrainingModule


def some_packs(documents: int = 48, *, seed: int = 3) -> Packs:
    """Random documents of 4 to 29 tokens in packs of at most 32."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 30, (documents,), generator=generator).tolist()
    rows = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]
    return pack([TokenizedDocument(ids, list(ids)) for ids in rows], length=32, seed=1)


def study_of(model: LlamaForCausalLM, *, objective: Objective | None = None, **options: Any) -> TrainingModule:
    """A study of a copy of `model` under a teacher that differs from it."""
    student, teacher = (type(model)(model.config).to(model.dtype) for _ in range(2))
    student.load_state_dict(model.state_dict())
    teacher.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})
    mixed = objective or ObjectiveConfig(cross_entropy=0.5).build()
    return TrainingModule(student, mixed, frozen={"teacher": teacher}, **options)


def settings(**changes: Any) -> TrainConfig:
    """Six steps of two packs, a checkpoint after every third."""
    given = {"tokens": 6 * 64, "context": 32, "batch_tokens": 64, "micro_tokens": 64, "seed": 5}
    return TrainConfig(**{**given, "learning_rate": 1e-2, "save_every": 3, **changes})


def weights(study: TrainingModule) -> dict[str, torch.Tensor]:
    """The student's weights as they are now."""
    return {name: weight.clone() for name, weight in study.student.state_dict().items()}


def assert_same_bits(a: TrainingModule, b: TrainingModule) -> None:
    """Both students are the same, bit for bit."""
    theirs = weights(b)
    for name, bits in weights(a).items():
        assert torch.equal(bits, theirs[name]), name
