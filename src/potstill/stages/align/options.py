"""The options of `align`. Nothing here imports torch, because the command line reads them for its help."""

from dataclasses import dataclass, field

from potstill.core.errors import UsageError
from potstill.core.options import ALLOW_PICKLE, DEVICE, DTYPE, TRUST_REMOTE_CODE, Option
from potstill.stages.alignment_options import ANSWER_TOKENS, MINUS, NUM_SAMPLES, PLUS, PROMPTS_PER_STEP, REWARD
from potstill.stages.options import COLUMNS, SAVE_DTYPE, TextOptions
from potstill.train.config import TrainConfig

EPOCHS, LEARNING_RATE, LORA_LEARNING_RATE = 1.0, 1e-6, 5e-6


@dataclass(frozen=True, kw_only=True)
class AlignTrainConfig(TrainConfig):
    """The settings of a training run with the defaults of alignment: one epoch, a small learning rate, no decay.

    With `prompts_per_step` P, `batch_tokens` are P times `context`, the most that the groups of P prompts can have. A
    pass holds as many groups as `micro_tokens` allow at their longest.

    Source: Rafailov et al., "Direct Preference Optimization" (arXiv:2305.18290), appendix B: a learning rate of 1e-6.
    Departs from the paper: AdamW and a cosine decay, where the paper has RMSprop and a constant rate.
    """

    tokens: int | None = Option[int | None](
        None, "Tokens to train on, such as 200k or 2M, instead of --epochs.", is_count=True
    ).field()
    epochs: float | None = Option[float | None](
        None, "Passes over all of the data, such as 3 or 0.5; default: 1."
    ).field()
    context: int = Option(
        1024, "Most tokens of a prompt with its answers; longer ones are left out and counted."
    ).field()
    batch_tokens: int = Option(
        4096, "Tokens per optimizer step, in total over all processes and forward passes."
    ).field()
    prompts_per_step: int = PROMPTS_PER_STEP.field()
    learning_rate: float = field(
        default=LEARNING_RATE,
        metadata={
            "option": Option[float | None](
                None,
                f"Peak learning rate of AdamW, before the cosine decay; default: {LEARNING_RATE:g}, or "
                f"{LORA_LEARNING_RATE:g} with --lora.",
                name="lr",
            )
        },
    )
    warmup: float = Option(0.1, "Share of the steps in which the learning rate rises linearly to its peak.").field()
    weight_decay: float = Option(0.0, "Weight decay of the matrices; norms and biases have none.").field()

    def __post_init__(self) -> None:
        if self.tokens is None and self.epochs is None:
            object.__setattr__(self, "epochs", EPOCHS)
        if self.prompts_per_step < 0:
            raise UsageError(f"prompts_per_step is {self.prompts_per_step}; it must be at least 0, such as 32")
        if self.prompts_per_step:
            object.__setattr__(self, "batch_tokens", self.prompts_per_step * self.context)
        super().__post_init__()

    def packs_per_pass(self, world_size: int = 1) -> int:
        """Packs in one forward pass, as in `TrainConfig`.

        Raises: UsageError if the prompts or packs of a step are not a multiple of the ranks.
        """
        if self.prompts_per_step % world_size:
            raise UsageError(
                f"a step of {self.prompts_per_step} prompts cannot be split evenly over {world_size} ranks; make "
                f"--prompts-per-step a multiple of {world_size}"
            )
        return super().packs_per_pass(world_size)


@dataclass(frozen=True, kw_only=True)
class AlignOptions(TextOptions):
    """The options of `align`."""

    model: str
    objective: str = Option(
        "dpo",
        "The loss to minimize, with options after a colon (dpo:beta=0.1,smoothing=0.1): dpo, ipo, simpo, orpo, kto, "
        "aligndistil or grpo. docs/align.md lists them.",
    ).field()
    data: str | tuple[str, ...] = Option[str | tuple[str, ...]](
        "",
        "The preferences, or the prompts of grpo: a file, a folder, or a hub data set id, also owner/name@revision. "
        "Repeat for several.",
    ).field()
    columns: str = COLUMNS.field()
    eval_data: str | None = Option[str | None](
        None, "Held-out data to measure on; by default a part of the data whose prompts are not trained on."
    ).field()
    reference: str | None = Option[str | None](
        None,
        "The frozen model to compare with, of the same tokenizer and chat template; by default MODEL before training.",
    ).field()
    reference_cache: str | None = Option[str | None](
        None, "Log-probabilities that `potstill cache MODEL --own` wrote, instead of running the reference."
    ).field()
    plus: str | None = PLUS.field()
    minus: str | None = MINUS.field()
    reward: str | None = REWARD.field()
    samples: int = NUM_SAMPLES.field()
    max_tokens: int = ANSWER_TOKENS.field()
    on_policy: float = Option(
        0.0, "For aligndistil: share of the prompts that the model itself answers in training, 0 to 1."
    ).field()
    settings: AlignTrainConfig = field(default_factory=AlignTrainConfig)
    lora: int = Option(
        0,
        "Rank of a LoRA adapter to train instead of all weights; potstill merges it at the end. The reference is then "
        "the model without its adapter. 0: no adapter.",
    ).field()
    train: str | None = Option[str | None](
        None, "Train only the parameters whose names match this regular expression; by default all."
    ).field()
    device: str = DEVICE.field()
    dtype: str = DTYPE.field()
    documents: int = Option(200, "Held-out preferences or prompts to measure on.").field()
    save_dtype: str = SAVE_DTYPE.field()
    skip_doctor: bool = Option(False, "Train even if a check of the model and the loss fails.").field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()
