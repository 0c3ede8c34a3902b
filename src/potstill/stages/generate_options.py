"""The options of `generate`: for one prompt, for a chat, and for a data set. Nothing here imports torch."""

from dataclasses import dataclass

from potstill.core.errors import UsageError
from potstill.core.options import ALLOW_PICKLE, DEVICE, IGNORE_GENERATION_CONFIG, SEED, TRUST_REMOTE_CODE, Option
from potstill.decode.drafters.options import NO_DRAFT, DraftOptions
from potstill.stages.options import COLUMNS, TextOptions

MAX_TOKENS, MAX_CHAT_TOKENS = 128, 1024  # of an answer
MAX_TOKENS_HELP = f"Most tokens per answer; by default {MAX_TOKENS}, in a chat {MAX_CHAT_TOKENS}."


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(TextOptions):
    """The options of `generate`, whatever it answers."""

    temperature: float = Option(0.0, "Sampling temperature; 0: greedy.").field()
    seed: int = SEED.field()
    device: str = DEVICE.field()
    dtype: str = Option(
        "auto", "Data type of the weights: bfloat16, float32, auto, or without --data int8 (another model)."
    ).field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(GenerateOptions):
    """The options of `generate` for one prompt or a chat."""

    max_tokens: int | None = Option[int | None](None, MAX_TOKENS_HELP).field()
    raw: bool = Option(False, "Continue the prompt as it is, without the chat template.").field()
    ignore_generation_config: bool = IGNORE_GENERATION_CONFIG.field()
    drafts: DraftOptions = NO_DRAFT

    def __post_init__(self) -> None:
        """Refuse a number that is none."""
        super().__post_init__()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"--max-tokens is {self.max_tokens}; it must be at least 1")
        if not self.temperature >= 0:
            raise UsageError(f"--temperature is {self.temperature}; it must be at least 0 (0 is greedy)")


@dataclass(frozen=True, kw_only=True)
class GenerateDatasetOptions(GenerateOptions):
    """The options of `generate` for a data set."""

    model: str
    data: str
    columns: str = COLUMNS.field()
    documents: int = Option(0, "Number of prompts of --data to answer; 0: all.").field()
    max_tokens: int = Option(MAX_TOKENS, MAX_TOKENS_HELP).field()
    batch: int = Option(8, "Prompts to answer at once.", on_command_line=False).field()
