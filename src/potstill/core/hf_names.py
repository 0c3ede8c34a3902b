"""Option names of Hugging Face's trainers: taken where one of ours means the same, answered with ours where not."""

from collections.abc import Collection

from potstill.core.errors import UsageError

SAME_MEANING = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "max_seq_length": "context",
    "max_seq_len": "context",
    "max_length": "context",
    "warmup_ratio": "warmup",
    "max_grad_norm": "clip",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "gradient_checkpointing": "checkpoint_activations",
    "torch_compile": "compile",
    "output_dir": "out",
    "overwrite_output_dir": "overwrite",
    "resume_from_checkpoint": "resume",
    "teacher_model_name_or_path": "teacher",
    "student_model_name_or_path": "student",
    "dataset_name": "data",
    "train_file": "data",
    "eval_file": "eval_data",
    "early_stopping_patience": "patience",
    "lora_r": "lora",
    "lmbda": "on_policy",
    "max_new_tokens": "max_tokens",
    "num_generations": "samples",
    "max_completion_length": "max_tokens",
    "reward_funcs": "reward",
    "ref_model": "reference",
}
ANSWERS = {
    "per_device_train_batch_size": "potstill counts tokens: give micro_tokens, the sequences times context",
    "train_batch_size": "potstill counts tokens: give batch_tokens, the sequences times context",
    "gradient_accumulation_steps": "it follows from batch_tokens (a step) and micro_tokens (a forward pass)",
    "max_steps": "potstill counts tokens: give tokens, the steps times batch_tokens",
    "warmup_steps": "give warmup, a share of the steps such as 0.05",
    "model_name_or_path": "give teacher, and student or keep",
    "bf16": "give dtype=bfloat16",
    "fp16": "potstill computes in bfloat16 or float32: give dtype",
    "packing": "potstill always packs documents, and isolates them",
    "lr_scheduler_type": "potstill always decays by a cosine; final_rate is its end",
    "optim": "potstill always trains with AdamW",
    "beta": "give objective='jsd:beta=0.5' or 'dpo:beta=0.1'",
    "loss_type": "give objective, such as dpo, ipo, simpo, orpo or kto",
    "label_smoothing": "give objective='dpo:smoothing=0.1'",
    "precompute_ref_log_probs": "write them with potstill cache MODEL --own, and give reference_cache",
}


def translate_name(name: str, known_names: Collection[str]) -> str:
    """Our name of an option: `name` if we know it, else what it means in Hugging Face's trainers.

    Raises: UsageError that says what to give, where no option of ours means the same.
    """
    if name in known_names:
        return name
    if SAME_MEANING.get(name) in known_names:
        return SAME_MEANING[name]
    if name in ANSWERS:
        raise UsageError(f"{name} is an option of Hugging Face's trainers; {ANSWERS[name]}")
    return name
