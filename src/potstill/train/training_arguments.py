"""Hugging Face's arguments for a training run."""

import math
from pathlib import Path

from transformers import TrainingArguments

from potstill.train.config import TrainConfig


def make_training_arguments(
    config: TrainConfig, folder: Path, *, device: str = "cpu", world_size: int = 1
) -> TrainingArguments:
    """Hugging Face's arguments for `config`, with checkpoints in `folder`."""
    steps, packs = config.steps, config.packs_per_pass(world_size)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=packs,
        per_device_eval_batch_size=packs,
        gradient_accumulation_steps=config.accumulation_steps(world_size),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.final_rate},
        warmup_steps=math.ceil(config.warmup * steps),
        weight_decay=config.weight_decay,
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        max_grad_norm=config.clip,
        seed=config.seed,
        data_seed=config.seed,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps",
        save_steps=config.save_every or max(10, steps // 10),
        save_total_limit=None,  # seal_checkpoint removes the older ones
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["labels"],
        average_tokens_across_devices=True,
        include_num_input_tokens_seen="all",
        ddp_find_unused_parameters=False,  # every trained weight is in the loss, and the search costs time
        report_to=list(config.report_to),
        disable_tqdm=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
    )
    args._n_gpu = min(1, args.n_gpu)  # else DataParallel would split rows and counts over the GPUs of this process
    return args
