"""One step of a policy gradient over groups of samples, by potstill and by TRL, with one reward: brevity."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from setting.steps import finish_step, make_trl_options

if TYPE_CHECKING:
    from potstill.train.rollouts.grouped import GroupedRollout

QUESTIONS = (
    "Write a short story about a lighthouse.",
    "How does a steam engine work?",
    "Describe a market in the morning.",
    "Explain why the sky is blue.",
    "Tell me about the history of glass.",
    "Describe how bread is made.",
    "Write a letter to a friend about a journey.",
    "Explain what a river delta is.",
)
SAMPLES, MAX_TOKENS = 8, 64
VARIANTS = ("grpo", "dr_grpo", "dapo")
OLD_LOG_P = "old_per_token_logps"  # TRL's name
Step = Callable[[], tuple[float, int]]  # the loss and the sampled tokens of the next step


def rate(texts: Sequence[str]) -> list[float]:
    """Minus a thousandth for each character."""
    return [-len(text) / 1000 for text in texts]


def make_rollout(
    policy: Any, tokenizer: Any, *, questions: Sequence[str], max_tokens: int, updates: int = 1
) -> "GroupedRollout":
    """potstill's rollout of groups of samples of `questions`."""
    from potstill.data.prompt_rows import Prompt
    from potstill.data.prompts import PromptTokenizer
    from potstill.decode.sampling import Sampling
    from potstill.decode.stop_tokens import require_stop_tokens
    from potstill.objectives.policy_options import PolicyOptions
    from potstill.train.rewards.weighted import RewardSum, RewardTerm
    from potstill.train.rollouts.grouped import GroupedRollout
    from potstill.train.rollouts.groups import GroupSampler

    encode = PromptTokenizer(tokenizer).encode
    prompts = [Prompt(encode([{"role": "user", "content": text}]), text, {}) for text in questions]
    term = RewardTerm(name="brevity", reward=lambda completions: rate([one.completion for one in completions]))
    sampler = GroupSampler(
        prompts=prompts,
        reward=RewardSum((term,)),
        tokenizer=tokenizer,
        sampling=Sampling(vocabulary=len(tokenizer), stop=require_stop_tokens(policy, tokenizer)),
        policy=PolicyOptions(updates=updates),
        samples=SAMPLES,
        max_tokens=max_tokens,
    )
    return GroupedRollout(sampler=sampler)


def make_prompt_batch(rollout: "GroupedRollout") -> Any:
    """The prompts of a step as a batch without samples."""
    from potstill.data.packing import collate
    from potstill.data.prompt_rows import pack_prompts

    packs = pack_prompts(rollout.sampler.prompts)
    return collate([packs[number] for number in range(len(packs))])


def make_module(policy: Any, variant: str, *, dtype: torch.dtype) -> Any:
    """potstill's training module with a variant of the policy gradient."""
    from potstill.objectives.config import ObjectiveConfig
    from potstill.train.training_module import TrainingModule

    objective = ObjectiveConfig.parse(f"grpo:variant={variant}", cross_entropy=0.0, temperature=1.0).build()
    return TrainingModule(policy, objective, compute_dtype=dtype)


def make_potstill_step(
    policy: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, *, questions: Sequence[str], dtype: torch.dtype
) -> Step:
    """Samples, rewards and one update of GRPO, as `potstill align` runs them."""
    from potstill.train.rollouts.steps import roll_out_step

    module = make_module(policy, "grpo", dtype=dtype)
    rollout = make_rollout(policy, tokenizer, questions=questions, max_tokens=MAX_TOKENS)
    prompts, numbers = make_prompt_batch(rollout), iter(range(1_000_000))

    def step() -> tuple[float, int]:
        module.student.train()
        (batch,) = roll_out_step(rollout, [prompts], module, seed=0, step=next(numbers), rank=0)
        loss = module(**batch)["loss"]
        loss.backward()
        return finish_step(module, optimizer, loss), int(rollout.pop_totals()["tokens"])

    return step


def make_trl_trainer(
    policy: Any, tokenizer: Any, variant: str, *, bf16: bool, questions: Sequence[str], max_tokens: int
) -> Any:
    """TRL's GRPOTrainer without gradient checkpointing, one update for each set of samples."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        loss_type=variant,
        epsilon_high=0.28 if variant == "dapo" else None,  # None: as below
        per_device_train_batch_size=len(questions) * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=max_tokens,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        beta=0.0,
        temperature=1.0,
        **make_trl_options(bf16=bf16),
    )
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in questions])
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=lambda completions, **_: rate([chat[0]["content"] for chat in completions]),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_trl_step(
    policy: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, *, questions: Sequence[str], dtype: torch.dtype
) -> Step:
    """GRPOTrainer's training step, with its own samples."""
    bf16 = dtype == torch.bfloat16
    trainer = make_trl_trainer(policy, tokenizer, "grpo", bf16=bf16, questions=questions, max_tokens=MAX_TOKENS)
    model = trainer.accelerator.prepare_model(trainer.model)
    model.train()
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in questions for _ in range(SAMPLES)]

    def step() -> tuple[float, int]:
        loss = trainer.training_step(model, rows, None)
        tokens = int(trainer._buffered_inputs[0]["completion_mask"].sum())
        return finish_step(policy, optimizer, loss), tokens

    return step


def pad_for_trl(batch: Any, pad: int) -> dict[str, Any]:
    """potstill's packed samples as TRL's padded batch: prompts on the left, completions on the right."""
    from potstill.train.rollouts.base import split_documents

    samples = [one for one in split_documents(batch) if (one.labels >= 0).any()]
    prompts = [one.input_ids[one.labels < 0] for one in samples]
    completions = [one.input_ids[one.labels >= 0] for one in samples]
    advantages = torch.tensor([float(one.fields["advantages"]) for one in samples])
    return {
        "prompt_ids": pad_sequences(prompts, pad, left=True),
        "prompt_mask": pad_sequences([torch.ones_like(ids) for ids in prompts], 0, left=True),
        "completion_ids": pad_sequences(completions, pad, left=False),
        "completion_mask": pad_sequences([torch.ones_like(ids) for ids in completions], 0, left=False),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }


def pad_sequences(parts: Sequence[torch.Tensor], value: int, *, left: bool) -> torch.Tensor:
    """The sequences as rows of one length."""
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value, padding_side=side)


def load_policy(folder: Path) -> tuple[Any, Any]:
    """The policy that `setting.preferences.save_policy` wrote, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    from potstill.models import gguf, locate

    tokenizer = gguf.load_tokenizer(locate.get_packaged_path())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer
