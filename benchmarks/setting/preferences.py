"""Pairs of HH-RLHF as token ids, and one DPO step by potstill and by TRL on them.

A pair is the ids of (prompt, chosen answer, rejected answer); both answers end with the turn's end token.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from setting.steps import finish_step, make_trl_options

BETA = 0.1
FILE = "instruct/anthropics__hh-rlhf/harmless-base/test.jsonl.gz"  # below POTSTILL_DATA
LIMIT = 1024  # tokens of a whole chat; longer pairs are left out
Pair = tuple[list[int], list[int], list[int]]
Step = Callable[[list[Pair]], float]  # pairs to their loss


def load_pairs(number: int) -> list[Pair]:
    """The first `number` pairs whose sides differ in their last turn alone.

    The file has them in no order of length, so it needs no shuffle.
    """
    from potstill.data.preferences import load_preferences, to_preference
    from potstill.models import gguf, locate

    tokenizer = gguf.load_tokenizer(locate.get_packaged_path())
    pairs: list[Pair] = []
    for document in load_preferences(str(Path(os.environ["POTSTILL_DATA"]) / FILE)).documents:
        preference = to_preference(document)
        if len(preference.chosen) + len(preference.rejected) > 2:
            continue
        prompt = tokenizer.apply_chat_template(preference.prompt, add_generation_prompt=True, tokenize=False)
        answers = [f"{side[0]['content']}{tokenizer.eos_token}" for side in (preference.chosen, preference.rejected)]
        parts = [tokenizer(text, add_special_tokens=False).input_ids for text in (str(prompt), *answers)]
        if len(parts[0]) + max(map(len, parts[1:])) <= LIMIT:
            pairs.append((parts[0], parts[1], parts[2]))
        if len(pairs) == number:
            break
    return pairs


def save_policy(folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct in float32 to a folder, from which it loads faster than from its packaged file."""
    from potstill.models import gguf, locate

    gguf.load_model(locate.get_packaged_path(), dtype=torch.float32).save_pretrained(folder)


def load_policy(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The saved policy, and a frozen copy for products in `dtype`, as `potstill align` makes it."""
    from transformers import AutoModelForCausalLM

    from potstill.models.frozen_copy import copy_frozen

    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return policy, copy_frozen(policy, dtype)


def make_module(policy: Any, reference: Any, *, dtype: torch.dtype) -> Any:
    """potstill's training module with DPO."""
    from potstill.objectives.config import ObjectiveConfig
    from potstill.train.training_module import TrainingModule

    objective = ObjectiveConfig(name="dpo", options={"beta": BETA}).build()
    return TrainingModule(policy, objective, frozen={"reference": reference}, compute_dtype=dtype)


def make_potstill_step(
    policy: Any, reference: Any, optimizer: torch.optim.Optimizer, *, shared: bool, dtype: torch.dtype
) -> Step:
    """A step on packed pairs; with `shared`, both answers of a pair see one copy of its prompt."""
    from potstill.data.preferences import batch_of

    module = make_module(policy, reference, dtype=dtype)

    def step(pairs: list[Pair]) -> float:
        module.student.train()
        loss = module(**batch_of(pairs, shared=shared))["loss"]
        loss.backward()
        return finish_step(module, optimizer, loss)

    return step


def compute_reference(module: Any, pairs: list[Pair]) -> Tensor:
    """log p of each token of the answers under the reference, as `potstill cache --own` computes it."""
    from potstill.core.types import supervised_positions
    from potstill.data.preferences import batch_of
    from potstill.models.signals import compute_signals
    from potstill.objectives.row_terms import compute_target_log_probs

    batch = batch_of(pairs)
    device = batch["input_ids"].device
    with torch.no_grad(), module.autocast(device):
        needs = module.objective.needs(batch)["reference"]
        signals = compute_signals(module.frozen_models_by_name["reference"], batch, needs)
        return compute_target_log_probs(signals, supervised_positions(batch)[1])


class CachedReference:
    """A source of signals that gives stored log-probabilities, batch after batch."""

    def __init__(self, log_probs: Sequence[Tensor]) -> None:
        self.log_probs = iter(log_probs)

    def signals(self, batch: Mapping[str, Tensor], needs: Any, *, vocabulary: int | None = None) -> Any:
        """The log-probabilities of the next batch."""
        from potstill.core.types import NEXT_TOKEN_LOG_P, Signals

        log_p = next(self.log_probs)
        return Signals(torch.arange(len(log_p)), torch.Tensor, scores={NEXT_TOKEN_LOG_P: log_p})


def make_trl_trainer(policy: Any, reference: Any, *, bf16: bool) -> Any:
    """TRL's DPOTrainer without gradient checkpointing, which is faster and larger than its default."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from potstill.models import gguf, locate

    config = DPOConfig(beta=BETA, max_length=None, **make_trl_options(bf16=bf16))
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=rows,
        processing_class=gguf.load_tokenizer(locate.get_packaged_path()),
    )


def collate_trl(trainer: Any, pairs: list[Pair]) -> Any:
    """The padded batch of TRL's own collator."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return trainer.data_collator([dict(zip(names, pair, strict=True)) for pair in pairs])


def make_trl_step(policy: Any, reference: Any, optimizer: torch.optim.Optimizer, *, dtype: torch.dtype) -> Step:
    """DPOTrainer's training step."""
    trainer = make_trl_trainer(policy, reference, bf16=dtype == torch.bfloat16)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare_model(trainer.model)

    def step(pairs: list[Pair]) -> float:
        loss = trainer.training_step(model, collate_trl(trainer, pairs), None)
        return finish_step(policy, optimizer, loss)

    return step
