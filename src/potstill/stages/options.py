"""The options of every stage: names, types, defaults and help texts. The configs of the stages inherit from these.

Nothing here imports torch, because the command line reads these classes for `potstill VERB --help`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from potstill.core.errors import NotFound, UsageError
from potstill.core.options import ALLOW_PICKLE, CONTEXT, DEVICE, DTYPE, SEED, TRUST_REMOTE_CODE, Option
from potstill.models.tokenizers.named_templates import NAMED_TEMPLATES
from potstill.objectives.options import ObjectiveChoice
from potstill.stages.alignment_options import AlignmentOptions
from potstill.train.config import TrainConfig

LOCAL_TEACHER_HELP = "A hub id, a folder, a .gguf file, or smollm2."

COMBINE = Option(
    "average",
    "How to combine several teachers: average, confidence, or route:COLUMN (the column names the teacher).",
)
DATA: Option[str | tuple[str, ...]] = Option(
    "stdlib",
    "docstrings, stdlib, a file, a folder, or a hub data set id, also owner/name@revision. Repeat for several, each "
    "with its share of the text if you like: PATH:0.3.",
)
COLUMNS = Option(
    "", "Columns of the data, such as prompt=instruction,response=text; by default potstill recognizes them by name."
)
KEEP: Option[float | None] = Option(None, "Share of all stored parameters to keep, in (0, 1].")
PARAMS: Option[int | None] = Option(
    None, "Number of parameters to keep, such as 60M, instead of --keep.", is_count=True
)
STRATEGY = Option(
    "auto",
    "What to cut: depth, width, both, ffn (neurons only), or auto (depth for a share of 0.7 or more, both below).",
)
DRAFT_VOCABULARY: Option[int | None] = Option(
    None,
    "Number of most frequent tokens that the student scores when it drafts, such as 16k; by default all tokens.",
    is_count=True,
)
DOCUMENTS = Option(100, "Held-out documents to measure on.")
SAVE_DTYPE = Option("bfloat16", "Data type of the saved weights: bfloat16, float32 or float16.")
PROMPTS = Option(20, "Prompts to answer for ROUGE-L, on data with prompts and responses.")


TEXT_CHOICES = {
    "train_on": ("all", "last"),
    "special_in_text": ("keep", "escape", "refuse"),
    "on_bad_row": ("skip", "refuse"),
}


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The options of how rows become text, of every stage that reads data."""

    chat_template: str | None = Option[str | None](
        None,
        "The chat template to use instead of the model's, a Jinja file, minichat or phoenix; a "
        "trained model is saved with it.",
    ).field()
    mix_exponent: float = Option(
        1.0,
        "Share of each of several --data: its size to this power. 1: all documents; 0: equal shares; 0.5: between.",
    ).field()
    train_on: str = Option("all", "Which answers of a chat to train: all, or the last one only.").field()
    special_in_text: str = Option(
        "keep",
        "Control tokens inside the data's own text, such as <|im_end|>: keep, escape (read as plain text) or refuse.",
    ).field()
    on_bad_row: str = Option(
        "skip", "A row that cannot be read, or that the chat template refuses: skip (leave out and count) or refuse."
    ).field()

    def __post_init__(self) -> None:
        """Refuse a choice or a template file that does not exist."""
        for name, choices in TEXT_CHOICES.items():
            if getattr(self, name) not in choices:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} {getattr(self, name)!r} is none of {', '.join(choices)}")
        file = self.chat_template
        if file is not None and file not in NAMED_TEMPLATES and not Path(file).expanduser().is_file():
            raise NotFound(
                f"there is no file {file}; give --chat-template the path of a Jinja file, or "
                f"{' or '.join(NAMED_TEMPLATES)}"
            )


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TextOptions):
    """The options of `distill`; `plan` and `arena` take a subset."""

    teacher: str | tuple[str, ...] | None = Option[str | tuple[str, ...] | None](
        None,
        "A hub id, a folder, a .gguf file, smollm2, or a server (http://HOST:PORT/v1#MODEL). Repeat as NAME=TEACHER "
        "for several teachers; each may be a cache too. The measures compare the student with the first.",
    ).field()
    combine: str = COMBINE.field()
    student: str | None = Option[str | None](
        None,
        "A smaller model to train, instead of a pruned teacher (--keep, --params); with an objective such as "
        "dskdv2_eta its tokenizer may differ.",
    ).field()
    keep: float | None = KEEP.field()
    params: int | None = PARAMS.field()
    strategy: str = STRATEGY.field()
    data: str | tuple[str, ...] = DATA.field()
    columns: str = COLUMNS.field()
    eval_data: str | None = Option[str | None](
        None, "Held-out text; by default the validation split of the data."
    ).field()
    min_document_tokens: int = Option(
        0, "Train on documents of at least this many tokens, for a long context; 0: on all documents."
    ).field()
    short_share: float = Option(
        0.2, "With --min-document-tokens, share of the tokens from shorter documents, in [0, 1)."
    ).field()
    teacher_cache: str | None = Option[str | None](
        None, "Learn from a cache that `potstill cache` wrote, instead of running the teacher."
    ).field()
    top_k: int = Option(
        20, "Most likely tokens to request from a served teacher, for each position; vLLM allows 20 by default."
    ).field()
    objective: ObjectiveChoice = field(default_factory=ObjectiveChoice)
    settings: TrainConfig = field(default_factory=TrainConfig)
    lora: int = Option(
        0, "Rank of a LoRA adapter to train instead of all weights; potstill merges it at the end. 0: no adapter."
    ).field()
    train: str | None = Option[str | None](
        None, "Train only the parameters whose names match this regular expression, such as router; by default all."
    ).field()
    on_policy: float = Option(
        0.0, "Share of the documents whose completions the student samples in training, 0 to 1."
    ).field()
    rollout: str = Option(
        "gkd",
        "How to sample completions: gkd, distillm (growing share, with replay) or minillm (student and teacher mixed).",
    ).field()
    sizes_per_step: int | None = Option[int | None](
        None,
        "Sizes of an elastic student that a step trains: the largest, the smallest, and random others; default: 4.",
    ).field()
    sizes_from: str = Option(
        "teacher", "What teaches the smaller sizes of an elastic student: teacher, or largest (the largest size)."
    ).field()
    device: str = DEVICE.field()
    dtype: str = DTYPE.field()
    documents: int = DOCUMENTS.field()
    draft_vocabulary: int | None = DRAFT_VOCABULARY.field()
    save_dtype: str = SAVE_DTYPE.field()
    skip_doctor: bool = Option(False, "Train even if a check of teacher and student fails.").field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `plan`: those of the distillation, where the rates come from, and those of an alignment."""

    distill: DistillOptions
    measure: bool = Option(
        True,
        "Run a few training steps in memory to measure rates; without them the plan is immediate and less accurate.",
    ).field()
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)


@dataclass(frozen=True, kw_only=True)
class ArenaOptions:
    """The options of `arena`: those of the distillation that all arms share, the arms, the budget and the seeds."""

    common: DistillOptions
    objectives: tuple[str, ...]
    tokens: int | None = None
    seconds: float | None = None
    epochs: float | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    prompts: int = PROMPTS.field()


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(AlignmentOptions, TextOptions):
    """The options of `doctor`."""

    teacher: str | tuple[str, ...]
    combine: str = COMBINE.field()
    student: str | None = Option[str | None](None, "The student; by default a copy of the teacher.").field()
    data: str | tuple[str, ...] = DATA.field()
    columns: str = COLUMNS.field()
    teacher_cache: str | None = Option[str | None](
        None, "Also compare this cache with the outputs of the teacher."
    ).field()
    objective: ObjectiveChoice = field(default_factory=ObjectiveChoice)
    context: int | None = Option[int | None](
        None, "Most tokens per window; default: 512, and 1024 for the objectives of align."
    ).field()
    seed: int = SEED.field()
    device: str = DEVICE.field()
    dtype: str = DTYPE.field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()


@dataclass(frozen=True, kw_only=True)
class PruneOptions(TextOptions):
    """The options of `prune`."""

    model: str
    data: str | tuple[str, ...] = DATA.field()
    columns: str = COLUMNS.field()
    keep: float | None = KEEP.field()
    params: int | None = PARAMS.field()
    strategy: str = STRATEGY.field()
    shape: Mapping[str, int] = field(default_factory=dict)
    layers_by: str = Option("harm", "How to choose the layers to drop: harm (measured) or evenly (spaced).").field()
    calibration_tokens: int = Option(
        8192, "Tokens of the data on which importance and harm are measured.", on_command_line=False
    ).field()
    save_dtype: str = SAVE_DTYPE.field()
    seed: int = SEED.field()
    device: str = DEVICE.field()
    dtype: str = DTYPE.field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(TextOptions):
    """The options of `convert`."""

    model: str
    to: str
    data: str | tuple[str, ...] = DATA.field()
    columns: str = COLUMNS.field()
    calibration_tokens: int = Option(8192, "Tokens of the data that a conversion measures on.", is_count=True).field()
    save_dtype: str = SAVE_DTYPE.field()
    seed: int = SEED.field()
    device: str = DEVICE.field()
    dtype: str = DTYPE.field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()


@dataclass(frozen=True, kw_only=True)
class CacheTeacherOptions(TextOptions):
    """The options of `cache`."""

    teacher: str
    data: str | tuple[str, ...] = DATA.field()
    columns: str = COLUMNS.field()
    tokens: int | None = Option[int | None](
        None, "Tokens of the data to read, such as 2M; by default all of them.", is_count=True
    ).field()
    context: int = CONTEXT.field()
    top_k: int = Option(64, "Number of most likely tokens to store for each position.").field()
    mass: float = Option(
        1.0, "Store fewer of these tokens where together they already have this probability, in (0, 1]."
    ).field()
    classes: int = Option(
        16,
        "Store the probability of all other tokens in this many classes of tokens, 1 to 255.",
    ).field()
    sampled: int = Option(
        0, "Store this many sampled tokens instead of the most likely ones, for forward_kl only. 0: no sampling."
    ).field()
    exact: bool = Option(False, "Store log-probabilities as float32 instead of 8 bits.").field()
    own: bool = Option(False, "Store log-probabilities of the answers themselves, for align --reference-cache.").field()
    hidden: bool = Option(
        False, "Also store the last hidden states, as bfloat16; dskd, dskdv2 and tie_kd need them."
    ).field()
    temperature: float = Option(1.0, "The temperature that students will train with.").field()
    seed: int = SEED.field()
    device: str = DEVICE.field()
    dtype: str = DTYPE.field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(TextOptions):
    """The options of `measure`."""

    models: tuple[str, ...]
    data: str | tuple[str, ...] = DATA.field()
    columns: str = COLUMNS.field()
    split: str = Option(
        "validation",
        "Which part of the data to measure on: validation (5 % of a file, never trained on), train or all.",
    ).field()
    teacher: str | None = Option[str | None](
        None, "Also measure KL divergence to this teacher and agreement with it; all models need its tokenizer."
    ).field()
    reference: str | None = Option[str | None](
        None, "Measure how the models rank the answers of preferences, compared with this model before its alignment."
    ).field()
    documents: int = DOCUMENTS.field()
    context: int = CONTEXT.field()
    prompts: int = PROMPTS.field()
    positions: int = Option(
        0, "Also measure bits per byte by position, in windows of this many tokens of long documents, such as 4096."
    ).field()
    needle: int = Option(
        0, "Also test whether the model finds a sentence that is hidden in texts of up to this many tokens."
    ).field()
    speed: bool = Option(True, "Also measure tokens/s and memory.").field()
    tasks: tuple[str, ...] = Option[tuple[str, ...]](
        (), "An lm-eval task to run (needs pip install 'potstill[eval]'); repeat for several."
    ).field()
    device: str = DEVICE.field()
    dtype: str = DTYPE.field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()


@dataclass(frozen=True, kw_only=True)
class AdviseOptions(TextOptions):
    """The options of `advise`."""

    model: str
    data: str | tuple[str, ...]
    columns: str = COLUMNS.field()
    draft: tuple[str, ...] = Option[tuple[str, ...]](
        ("lookup", "suffix"),
        "What drafts, as in generate --draft; repeat for several. By default lookup and suffix.",
    ).field()
    draft_length: str = Option("1,2,3,4,6,8", "The numbers of tokens per draft to try.").field()
    tree: tuple[str, ...] = Option[tuple[str, ...]](
        (), "A tree to try, as in generate --tree; repeat for several."
    ).field()
    prompts: int = Option(8, "Prompts of the data to answer.").field()
    max_tokens: int = Option(64, "Most tokens per answer.").field()
    temperature: float = Option(0.0, "Sampling temperature; 0: greedy.").field()
    check: bool = Option(True, "Also measure the speed-ups that are predicted.").field()
    runs: int = Option(3, "Times to measure each of them; the median counts.").field()
    seed: int = SEED.field()
    device: str = DEVICE.field()
    dtype: str = Option(
        "auto", "Data type of the weights: bfloat16, float32, int8 (another model), or auto (the faster one here)."
    ).field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()
