"""The options of `generate`: for one prompt, for a chat, and for a data set. Nothing here imports torch."""

import re
from dataclasses import dataclass

from potstill.core.errors import UsageError
from potstill.core.options import ALLOW_PICKLE, DEVICE, IGNORE_GENERATION_CONFIG, SEED, TRUST_REMOTE_CODE, Option
from potstill.decode.drafters.options import NO_DRAFT, DraftOptions
from potstill.stages.options import COLUMNS, TextOptions

MAX_TOKENS, MAX_CHAT_TOKENS = 128, 1024  # of an answer
SHARE = re.compile(r"\d*\.?\d+")
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
class DataOptions(GenerateOptions):
    """Which prompts of a data set a model answers, and at what length."""

    model: str
    data: str | tuple[str, ...]
    columns: str = COLUMNS.field()
    documents: int = Option(0, "Number of prompts of --data to answer; 0: all.").field()
    max_tokens: int = Option(MAX_TOKENS, MAX_TOKENS_HELP).field()
    batch: int = Option(8, "Prompts to answer at once.", on_command_line=False).field()


@dataclass(frozen=True, kw_only=True)
class GenerateDatasetOptions(DataOptions):
    """The options of `generate` for a data set."""

    self_instruct: int = Option(
        0, "First write this many new prompts in the manner of those in --data, and answer these instead; 0: none."
    ).field()
    translate: bool = Option(
        False, "First translate each prompt into a language drawn from --languages; the answer is written in it."
    ).field()
    languages: str = Option("", "The probabilities of languages for --translate, such as en:0.4,zh:0.3,fr:0.3.").field()
    source_language: str = Option(
        "en", "The language of the prompts for --translate: a prompt that draws it stays as it is."
    ).field()
    translate_prompt: str | None = Option[str | None](
        None, "How to ask for a translation, with {language} and {text}, which are filled in."
    ).field()
    instruct_prompt: str | None = Option[str | None](
        None, "How to ask for a new prompt, with {examples}: four prompts are filled in."
    ).field()


def check_rewriting(options: GenerateDatasetOptions) -> None:
    """Refuse numbers, languages and requests with which no prompt can be rewritten.

    Raises: UsageError.
    """
    if options.self_instruct < 0:
        raise UsageError(f"--self-instruct is {options.self_instruct}; it must be at least 0")
    if options.translate != bool(options.languages):
        raise UsageError(
            "--translate and --languages go together; give both, such as --translate --languages en:0.5,zh:0.5"
        )
    if options.translate:
        parse_language_shares(options.languages)
    for flag, prompt, names in (
        ("--translate-prompt", options.translate_prompt, ("{language}", "{text}")),
        ("--instruct-prompt", options.instruct_prompt, ("{examples}",)),
    ):
        if prompt is not None and (missing_names := [name for name in names if name not in prompt]):
            raise UsageError(f"{flag} lacks {' and '.join(missing_names)}, where potstill fills in a text; add it")
    for flag, name, is_used in (
        ("--translate", "source_language", options.translate),
        ("--translate", "translate_prompt", options.translate),
        ("--self-instruct", "instruct_prompt", options.self_instruct > 0),
    ):
        if not is_used and getattr(options, name) != getattr(GenerateDatasetOptions, name):
            raise UsageError(f"--{name.replace('_', '-')} is for {flag}; give that too, or omit it")


def parse_language_shares(text: str) -> dict[str, float]:
    """The shares of languages in `en:0.4,zh:0.6`, as they are given.

    Raises: UsageError for another form, a share that is not above 0, or a language that is given twice.
    """
    shares: dict[str, float] = {}
    for entry in text.split(","):
        name, _, number = (part.strip() for part in entry.partition(":"))
        share = float(number) if SHARE.fullmatch(number) else 0.0
        if not name or share <= 0 or name in shares:
            raise UsageError(
                f"--languages {text!r} is not LANGUAGE:SHARE,... with each language once and shares above 0, such as "
                f"en:0.4,zh:0.3,fr:0.3"
            )
        shares[name] = share
    return shares
