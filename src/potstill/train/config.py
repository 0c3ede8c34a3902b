"""The settings of a training run, with their defaults."""

import math
from dataclasses import dataclass, replace

from potstill.core.errors import UsageError
from potstill.core.options import CONTEXT, SEED, Option

DEFAULT_TOKENS = 200_000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, learning rate, batches and checkpoints of a training run. The defaults are measured on SmolLM2 (LOG.md).

    The length is `tokens` or `epochs`; `resolve_epochs` turns epochs into tokens once the text is packed.
    """

    tokens: int | None = Option[int | None](
        None, "Tokens to train on, such as 200k or 2M; 200k without --epochs.", is_count=True
    ).field()
    epochs: float | None = Option[float | None](
        None, "Passes over the whole text instead of --tokens, such as 3 or 0.5."
    ).field()
    context: int = CONTEXT.field()
    batch_tokens: int = Option(
        2048, "Tokens per optimizer step, in total over all processes and forward passes."
    ).field()
    micro_tokens: int = Option(
        2048, "Most tokens per forward pass and process; fewer need less memory and give the same gradient."
    ).field()
    learning_rate: float = Option(5e-4, "Peak learning rate of AdamW, before the cosine decay.", name="lr").field()
    warmup: float = Option(0.05, "Share of the steps in which the learning rate rises linearly to its peak.").field()
    final_rate: float = Option(
        0.1, "Learning rate at the end of the cosine schedule, as a share of the peak.", on_command_line=False
    ).field()
    weight_decay: float = Option(0.01, "Weight decay of the matrices; norms and biases have none.").field()
    neftune: float = Option(
        0.0, "Noise on the student's input embeddings in training (NEFTune's alpha), such as 5; 0: no noise."
    ).field()
    clip: float = Option(
        1.0, "Largest norm of the gradient; larger ones are scaled down. 0: no limit.", on_command_line=False
    ).field()
    seed: int = SEED.field()
    eval_every: int = Option(0, "Steps between evaluations; 0: evaluate at the end only.").field()
    save_every: int = Option(0, "Steps between checkpoints; 0: a tenth of the run, at least 10 steps.").field()
    keep_checkpoints: int = Option(
        0, "Newest checkpoints to keep in OUT/checkpoints at the end; each takes about six times the student's bytes."
    ).field()
    patience: int = Option(
        0, "Stop after this many evaluations without improvement, and keep the best weights; 0: never stop early."
    ).field()
    checkpoint_activations: bool = Option(
        False, "Recompute the student's blocks in the backward pass: less memory, more time."
    ).field()
    compile: bool = Option(False, "Compile the layers of student and teacher with torch.compile.").field()
    shard: bool = Option(
        False, "Under torchrun: split weights, gradients and optimizer states over the processes."
    ).field()
    report_to: tuple[str, ...] = Option[tuple[str, ...]](
        (), "Also log to tensorboard, wandb or trackio; repeat for several. metrics.jsonl is always written."
    ).field()

    def __post_init__(self) -> None:
        if self.tokens is not None and self.epochs is not None:
            raise UsageError("tokens and epochs both say how long to train; give one of them")
        if self.epochs is None:
            object.__setattr__(self, "tokens", DEFAULT_TOKENS if self.tokens is None else self.tokens)
        elif not 0 < self.epochs < math.inf:
            raise UsageError(f"epochs is {self.epochs}; it must be above 0, such as 3 or 0.5")
        for name in ("tokens", "context", "batch_tokens", "micro_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_tokens < self.context:
            raise UsageError(
                f"batch_tokens is {self.batch_tokens}, less than one window of {self.context}; raise --batch-tokens or "
                f"lower --context"
            )
        if not 0 < self.learning_rate < 1:
            raise UsageError(f"learning_rate is {self.learning_rate}; it must be between 0 and 1")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is {self.warmup}; it is a share of the steps, at least 0 and below 1")
        if not 0 <= self.final_rate <= 1:
            raise UsageError(f"final_rate is {self.final_rate}; it is a share of the learning rate, from 0 to 1")
        for name in ("weight_decay", "clip", "seed", "eval_every", "save_every", "keep_checkpoints", "patience"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.neftune < math.inf:
            raise UsageError(f"neftune is {self.neftune}; it must be at least 0, such as 5")
        if self.patience and not self.eval_every:
            raise UsageError("patience counts evaluations; set eval_every too")

    @property
    def packs_per_step(self) -> int:
        """Packs in one optimizer step, over all ranks and passes."""
        return self.batch_tokens // self.context

    def packs_per_pass(self, world_size: int = 1) -> int:
        """Packs in one forward pass: as many as `micro_tokens` allows, so that a step is a whole number of passes.

        Raises: UsageError if the packs of a step are not a multiple of the ranks.
        """
        if self.packs_per_step % world_size:
            raise UsageError(
                f"a step of {self.packs_per_step} windows cannot be split evenly over {world_size} ranks; make "
                f"--batch-tokens a multiple of {self.context * world_size}"
            )
        packs_per_rank = self.packs_per_step // world_size
        max_packs = max(1, self.micro_tokens // self.context)
        return max(packs for packs in range(1, min(max_packs, packs_per_rank) + 1) if packs_per_rank % packs == 0)

    def accumulation_steps(self, world_size: int = 1) -> int:
        """Forward passes per optimizer step and rank."""
        return self.packs_per_step // (self.packs_per_pass(world_size) * world_size)

    @property
    def steps(self) -> int:
        """The number of optimizer steps for `tokens`."""
        assert self.tokens is not None, "`resolve_epochs` turns epochs into tokens"
        return max(1, round(self.tokens / (self.packs_per_step * self.context)))

    def resolve_epochs(self, num_packs: int, *, updates: int | None = None) -> "TrainConfig":
        """The same settings with the tokens that `epochs` passes over `num_packs` packs take, in whole steps.

        The last step of a pass holds the packs that remain, as in Hugging Face's trainer. With `updates`, those of a
        rollout of steps, a pass has no such step, and each other one comes `updates` times, as in `RepeatSampler`.
        """
        if self.epochs is None:
            return self
        if updates is None:
            steps_per_pass = math.ceil(num_packs / self.packs_per_step)
        else:
            steps_per_pass = num_packs // self.packs_per_step * updates
        steps = math.ceil(self.epochs * steps_per_pass)
        return replace(self, tokens=steps * self.packs_per_step * self.context, epochs=None)

    def count_tokens(self, text_tokens: int) -> int:
        """The tokens that the run should train on, of a text with `text_tokens` of them."""
        return round(self.epochs * text_tokens) if self.epochs is not None else self.tokens or 0
