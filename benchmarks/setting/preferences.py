"""Pairs of HH-RLHF as token ids, one DPO step by potstill and by TRL on them, and a whole run of TRL.

A pair is the ids of (prompt, chosen answer, rejected answer); both answers end with the turn's end token.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from setting.steps import finish_step, make_trl_options

BETA = 0.1
SIDES = ("chosen", "rejected")
FILE = "instruct/anthropics__hh-rlhf/harmless-base/test.jsonl.gz"  # below POTSTILL_DATA
PLACEHOLDER = [{"prompt": "a", "chosen": "b", "rejected": "c"}]  # for a trainer that gets its batches one by one
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


def make_trl_trainer(
    policy: Any, reference: Any, *, bf16: bool, rows: Sequence[Mapping[str, Any]] = PLACEHOLDER, **options: Any
) -> Any:
    """TRL's DPOTrainer without gradient checkpointing, which is faster and larger than its default.

    Without a `reference` TRL copies the policy. `options` are those of DPOConfig.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from potstill.models import gguf, locate

    config = DPOConfig(beta=BETA, max_length=None, **make_trl_options(bf16=bf16), **options)
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(list(rows)),
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


def train_trl(out: Path, name: str, file: Path, *, context: int, steps: int, lr: float, seed: int) -> None:
    """Trains a model by TRL's DPOTrainer for one epoch of a file's pairs, in about `steps` steps, and saves it.

    Of every pair, prompt and both answers have at most `context` tokens together, as in `potstill align`.
    """
    from potstill.core.device import resolve_dtype
    from potstill.models.load import load_model
    from potstill.train.config import TrainConfig

    loaded = load_model(name)
    rows = [row for row in list_rows(file) if count_tokens(loaded.tokenizer, row) <= context]
    trainer = make_trl_trainer(
        loaded.model.float(),
        None,
        bf16=resolve_dtype() == torch.bfloat16,
        rows=rows,
        learning_rate=lr,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": TrainConfig.final_rate},
        warmup_steps=0.1,  # below 1 it is a share of the steps
        adam_beta2=0.95,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, round(len(rows) / steps)),
        num_train_epochs=1,
        save_strategy="no",
        logging_strategy="no",  # its lines would stand before the document on stdout
        seed=seed,
    )
    trainer.train()
    print(f"TRL: {len(rows)} pairs in {trainer.state.global_step} steps", file=sys.stderr)
    loaded.tokenizer.save_pretrained(out)
    loaded.model.save_pretrained(out)


def list_rows(file: Path) -> list[dict[str, list[Any]]]:
    """The pairs of a file that `potstill align` trains on, as TRL reads them; a twentieth is held out."""
    from potstill.data.preferences import load_preferences, to_preference

    pairs = map(to_preference, load_preferences(str(file)).documents)
    return [{"prompt": list(p.prompt), "chosen": list(p.chosen), "rejected": list(p.rejected)} for p in pairs]


def count_tokens(tokenizer: Any, row: Mapping[str, list[Any]]) -> int:
    """The tokens of a prompt with both answers; the last token of the prompt precedes each answer."""
    prompt = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
    sides = [tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False) for side in SIDES]
    return prompt + 1 + sum(len(ids) - prompt for ids in sides)
