"""One optimizer step by potstill and by TRL, of the same student on the same documents (lists of token ids)."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[list[list[int]]], float]  # documents to their loss


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    """The optimizer of all sides."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def make_trl_options(*, bf16: bool) -> dict[str, Any]:
    """The settings of every trainer of TRL: on the CPU, and without gradient checkpointing, which costs time."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "bf16": bf16,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": [],
    }


def make_potstill_step(teacher: Any, student: Any, optimizer: torch.optim.Optimizer) -> Step:
    """A step with packed documents and the fused loss; `teacher` is a live model or its cache."""
    from potstill.objectives.logit_distillation import LogitDistillation
    from potstill.train.training_module import TrainingModule

    module = TrainingModule(student, LogitDistillation(), frozen={"teacher": teacher}, compute_dtype=torch.bfloat16)
    return make_step(module, optimizer, pack_documents)


def make_step(module: Any, optimizer: torch.optim.Optimizer, read: Callable[[list[list[int]]], Any]) -> Step:
    """A step of potstill's training module on the batch that `read` makes of documents."""

    def step(batch: list[list[int]]) -> float:
        module.student.train()
        loss = module(**read(batch))["loss"]
        loss.backward()
        return finish_step(module, optimizer, loss)

    return step


def pack_documents(batch: list[list[int]], add_inputs: Callable[[Any], Any] = dict) -> Any:
    """The documents end to end, trained from each one's second token; `add_inputs` adds the teacher's inputs."""
    from potstill.data.packing import collate

    ids = torch.tensor([i for document in batch for i in document])
    labels = torch.tensor([i for document in batch for i in [-100, *document[1:]]])
    lengths = torch.tensor([len(document) for document in batch])
    return collate([add_inputs({"input_ids": ids, "labels": labels, "lengths": lengths})])


def make_trl_step(teacher: Any, student: Any, optimizer: torch.optim.Optimizer) -> Step:
    """GKDTrainer's training step on the padded batch: forward KL (beta 0), off-policy (lmbda 0)."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from potstill.models import gguf, locate

    tokenizer = gguf.load_tokenizer(locate.get_packaged_path())
    config = GKDConfig(lmbda=0.0, beta=0.0, temperature=1.0, **make_trl_options(bf16=True))
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=config, train_dataset=rows, processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare_model(trainer.model)

    def step(batch: list[list[int]]) -> float:
        width = max(map(len, batch))
        padded = [[*d, *[tokenizer.pad_token_id] * (width - len(d))] for d in batch]
        mask = [[1] * len(d) + [0] * (width - len(d)) for d in batch]
        labels = [[*d, *[-100] * (width - len(d))] for d in batch]
        inputs = {"input_ids": padded, "attention_mask": mask, "labels": labels}
        loss = trainer.training_step(model, {k: torch.tensor(v) for k, v in inputs.items()}, None)
        return finish_step(student, optimizer, loss)

    return step


def finish_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    """Clips, steps and zeroes, equally for all sides."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def differentiate(model: torch.nn.Module, loss: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """The loss, and its gradient by each weight."""
    model.zero_grad()
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return loss.item(), gradients


def compute_cosine(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The cosine between two gradients by all weights, summed in float64 weight by weight."""

    def multiply(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return sum(float(x.flatten().double() @ y.flatten().double()) for x, y in zip(a, b, strict=True))

    return multiply(first, second) / (multiply(first, first) * multiply(second, second)) ** 0.5
