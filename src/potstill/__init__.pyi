"""The Python API with its signatures; `python tests/surface/test_api.py` writes this file."""

from collections.abc import Callable, Sequence
from pathlib import Path

from potstill.core.results import MeasureTable, Report
from potstill.models.hf_causal_lm import AutoModelForCausalLM as AutoModelForCausalLM
from potstill.models.load import LoadedModel
from potstill.objectives.user_file import ObjectiveSource
from potstill.stages.caller_objects import DataSource, ModelSource
from potstill.stages.training import TrainingResult

__version__: str

def distill(
    *,
    out: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    train_on: str = "all",
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    teacher: ModelSource | Sequence[ModelSource] | None = None,
    combine: str = "average",
    student: ModelSource | None = None,
    keep: float | None = None,
    params: int | str | None = None,
    strategy: str = "auto",
    data: DataSource | Sequence[str | Path] = "stdlib",
    columns: str = "",
    eval_data: DataSource | None = None,
    min_document_tokens: int = 0,
    short_share: float = 0.2,
    teacher_cache: str | Path | None = None,
    top_k: int = 20,
    objective: ObjectiveSource = "forward_kl",
    cross_entropy: float = 0.7,
    temperature: float = 1.0,
    tokens: int | str | None = None,
    epochs: float | None = None,
    context: int = 512,
    batch_tokens: int = 2048,
    micro_tokens: int = 2048,
    lr: float = 0.0005,
    warmup: float = 0.05,
    final_rate: float = 0.1,
    weight_decay: float = 0.01,
    neftune: float = 0.0,
    clip: float = 1.0,
    seed: int = 1,
    eval_every: int = 0,
    save_every: int = 0,
    keep_checkpoints: int = 0,
    patience: int = 0,
    checkpoint_activations: bool = False,
    compile: bool = False,
    shard: bool = False,
    report_to: Sequence[str] = (),
    lora: int = 0,
    train: str | None = None,
    on_policy: float = 0.0,
    rollout: str = "gkd",
    sizes_per_step: int | None = None,
    sizes_from: str = "teacher",
    device: str = "auto",
    dtype: str = "auto",
    documents: int = 100,
    draft_vocabulary: int | str | None = None,
    save_dtype: str = "bfloat16",
    skip_doctor: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> TrainingResult:
    """Train a small student to predict like a teacher, and measure both; write the model and its card to `out`.

    Give several teachers as a sequence of `NAME=TEACHER`, and your own loss as a function or class.

    Raises: PotstillError, as the command line does; UsageError for an unknown option.
    """

def align(
    model: ModelSource,
    *,
    data: DataSource | Sequence[str | Path],
    out: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    objective: ObjectiveSource = "dpo",
    columns: str = "",
    eval_data: DataSource | None = None,
    reference: ModelSource | None = None,
    reference_cache: str | Path | None = None,
    plus: ModelSource | None = None,
    minus: ModelSource | None = None,
    reward: str | None = None,
    samples: int = 8,
    max_tokens: int = 64,
    on_policy: float = 0.0,
    tokens: int | str | None = None,
    epochs: float | None = None,
    context: int = 1024,
    batch_tokens: int = 4096,
    micro_tokens: int = 2048,
    lr: float | None = None,
    warmup: float = 0.1,
    final_rate: float = 0.1,
    weight_decay: float = 0.0,
    neftune: float = 0.0,
    clip: float = 1.0,
    seed: int = 1,
    eval_every: int = 0,
    save_every: int = 0,
    keep_checkpoints: int = 0,
    patience: int = 0,
    checkpoint_activations: bool = False,
    compile: bool = False,
    shard: bool = False,
    report_to: Sequence[str] = (),
    prompts_per_step: int = 0,
    lora: int = 0,
    train: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    documents: int = 200,
    save_dtype: str = "bfloat16",
    skip_doctor: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> TrainingResult:
    """Train `model` with preferences or rewards, and measure it before and after; write it and its card to `out`.

    `objective` is dpo, ipo, simpo, orpo, kto, aligndistil or grpo, with options such as `"dpo:beta=0.1"`.

    Raises: PotstillError, as the command line does; UsageError for an unknown option.
    """

def prune(
    model: ModelSource,
    *,
    out: str | Path,
    overwrite: bool = False,
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    train_on: str = "all",
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    data: DataSource | Sequence[str | Path] = "stdlib",
    columns: str = "",
    keep: float | None = None,
    params: int | str | None = None,
    strategy: str = "auto",
    layers_by: str = "harm",
    calibration_tokens: int = 8192,
    save_dtype: str = "bfloat16",
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Prune `model` to a number of parameters, check that it reloads to the same logits, and return its card.

    `shape` gives exact sizes, such as `{"layers": 20, "kv_heads": 3, "ffn": 1024, "hidden": 512}`.

    Raises: PotstillError, as the command line does.
    """

def convert(
    model: ModelSource,
    *,
    to: str,
    out: str | Path,
    overwrite: bool = False,
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    train_on: str = "all",
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    data: DataSource | Sequence[str | Path] = "stdlib",
    columns: str = "",
    calibration_tokens: int | str = 8192,
    save_dtype: str = "bfloat16",
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Change what the layers of `model` are, check that it reloads to the same logits, and return its card.

    `to` is a conversion with its options, such as `"deltanet"` or `"experts:experts=4"`; `distill` heals the result.

    Raises: PotstillError, as the command line does.
    """

def measure(
    *models: ModelSource,
    out: str | Path | None = None,
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    train_on: str = "all",
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    data: DataSource | Sequence[str | Path] = "stdlib",
    columns: str = "",
    split: str = "validation",
    teacher: ModelSource | Sequence[ModelSource] | None = None,
    reference: ModelSource | None = None,
    documents: int = 100,
    context: int = 512,
    prompts: int = 20,
    positions: int = 0,
    needle: int = 0,
    speed: bool = True,
    tasks: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> MeasureTable:
    """Measure the quality and speed of models, by name; `out` also keeps the measures as JSON, for `frontier`.

    Raises: PotstillError, as the command line does.
    """

def frontier(
    *sources: str | Path,
    out: str | Path = "frontier.html",
    title: str = "Quality against cost",
) -> Report:
    """Draw measured models on one chart of quality against cost, as HTML and PNG; return its points and files.

    Raises: PotstillError, as the command line does.
    """

def generate(
    model: ModelSource,
    prompt: str | None = None,
    *,
    data: DataSource | Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    on_text: Callable[[str], object] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    train_on: str = "all",
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    temperature: float = 0.0,
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    columns: str = "",
    documents: int = 0,
    max_tokens: int = 128,
    batch: int = 8,
    self_instruct: int = 0,
    translate: bool = False,
    languages: str = "",
    source_language: str = "en",
    translate_prompt: str | None = None,
    instruct_prompt: str | None = None,
    select: str | None = None,
    samples: int = 0,
    top_p: float = 1.0,
    consistency: str = "numbers",
    reward: str = "accuracy",
    pivot: str = "en",
    pivot_pairs: bool = False,
    pivot_answer: str = "consistent",
    per_language: int = 0,
    exclude: Sequence[str] = (),
    raw: bool = False,
    ignore_generation_config: bool = False,
    draft: ModelSource | None = None,
    draft_length: str | None = None,
    tree: str | None = None,
) -> str | Report:
    """The answer to `prompt`; or answers to all prompts of `data`, written to `out` as a data set, with its card.

    With `select` it draws several samples for each prompt of `data`, and writes what it selects from them.
    `on_text` receives the pieces of the answer to `prompt` as they are written.

    Raises: PotstillError, as the command line does.
    """

def plan(
    *,
    out: str | Path = ".",
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    train_on: str = "all",
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    teacher: ModelSource | Sequence[ModelSource] | None = None,
    combine: str = "average",
    student: ModelSource | None = None,
    keep: float | None = None,
    params: int | str | None = None,
    strategy: str = "auto",
    data: DataSource | Sequence[str | Path] = "stdlib",
    columns: str = "",
    eval_data: DataSource | None = None,
    min_document_tokens: int = 0,
    short_share: float = 0.2,
    teacher_cache: str | Path | None = None,
    top_k: int = 20,
    objective: ObjectiveSource = "forward_kl",
    cross_entropy: float = 0.7,
    temperature: float = 1.0,
    tokens: int | str | None = None,
    epochs: float | None = None,
    context: int = 512,
    batch_tokens: int = 2048,
    micro_tokens: int = 2048,
    lr: float = 0.0005,
    warmup: float = 0.05,
    final_rate: float = 0.1,
    weight_decay: float = 0.01,
    neftune: float = 0.0,
    clip: float = 1.0,
    seed: int = 1,
    eval_every: int = 0,
    save_every: int = 0,
    keep_checkpoints: int = 0,
    patience: int = 0,
    checkpoint_activations: bool = False,
    compile: bool = False,
    shard: bool = False,
    report_to: Sequence[str] = (),
    lora: int = 0,
    train: str | None = None,
    on_policy: float = 0.0,
    rollout: str = "gkd",
    sizes_per_step: int | None = None,
    sizes_from: str = "teacher",
    device: str = "auto",
    dtype: str = "auto",
    documents: int = 100,
    draft_vocabulary: int | str | None = None,
    save_dtype: str = "bfloat16",
    skip_doctor: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    measure: bool = True,
    plus: ModelSource | None = None,
    minus: ModelSource | None = None,
    reward: str | None = None,
    samples: int = 8,
    max_tokens: int = 64,
    prompts_per_step: int = 0,
) -> Report:
    """Estimate memory, disk and time of `distill` with the same options; it writes nothing.

    With an objective of preferences it is `align` of the `student`, whose reference is the `teacher`.

    Raises: PotstillError, as the command line does.
    """

def doctor(
    *,
    teacher: ModelSource | Sequence[str | Path],
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    train_on: str = "all",
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    plus: ModelSource | None = None,
    minus: ModelSource | None = None,
    reward: str | None = None,
    samples: int = 8,
    max_tokens: int = 64,
    combine: str = "average",
    student: ModelSource | None = None,
    data: DataSource | Sequence[str | Path] = "stdlib",
    columns: str = "",
    teacher_cache: str | Path | None = None,
    objective: ObjectiveSource = "forward_kl",
    cross_entropy: float = 0.7,
    temperature: float = 1.0,
    context: int | None = None,
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Check that training computes the right loss for your teacher, student and data: `passed`, and all `checks`.

    Raises: PotstillError, as the command line does.
    """

def arena(
    *,
    out: str | Path,
    objectives: Sequence[str],
    tokens: int | str | None = None,
    epochs: float | None = None,
    seconds: float | None = None,
    seeds: Sequence[int] = (1, 2, 3),
    overwrite: bool = False,
    resume: bool = False,
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    train_on: str = "all",
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    teacher: ModelSource | Sequence[ModelSource] | None = None,
    combine: str = "average",
    student: ModelSource | None = None,
    keep: float | None = None,
    params: int | str | None = None,
    strategy: str = "auto",
    data: DataSource | Sequence[str | Path] = "stdlib",
    columns: str = "",
    eval_data: DataSource | None = None,
    min_document_tokens: int = 0,
    short_share: float = 0.2,
    teacher_cache: str | Path | None = None,
    top_k: int = 20,
    cross_entropy: float = 0.7,
    temperature: float = 1.0,
    context: int = 512,
    batch_tokens: int = 2048,
    micro_tokens: int = 2048,
    lr: float = 0.0005,
    warmup: float = 0.05,
    final_rate: float = 0.1,
    weight_decay: float = 0.01,
    neftune: float = 0.0,
    clip: float = 1.0,
    seed: int = 1,
    eval_every: int = 0,
    save_every: int = 0,
    keep_checkpoints: int = 0,
    patience: int = 0,
    checkpoint_activations: bool = False,
    compile: bool = False,
    shard: bool = False,
    report_to: Sequence[str] = (),
    lora: int = 0,
    train: str | None = None,
    on_policy: float = 0.0,
    rollout: str = "gkd",
    sizes_per_step: int | None = None,
    sizes_from: str = "teacher",
    device: str = "auto",
    dtype: str = "auto",
    documents: int = 100,
    draft_vocabulary: int | str | None = None,
    save_dtype: str = "bfloat16",
    skip_doctor: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    prompts: int = 20,
) -> Report:
    """Train the same student with each of `objectives`, with equal data, seeds and budget, and compare the students.

    The budget is `tokens`, `epochs` or `seconds`; by default 200k tokens.

    Raises: PotstillError, as the command line does.
    """

def cache(
    *,
    teacher: ModelSource,
    out: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    train_on: str = "all",
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    data: DataSource | Sequence[str | Path] = "stdlib",
    columns: str = "",
    tokens: int | str | None = None,
    context: int = 512,
    top_k: int = 64,
    mass: float = 1.0,
    classes: int = 16,
    sampled: int = 0,
    exact: bool = False,
    own: bool = False,
    hidden: bool = False,
    temperature: float = 1.0,
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Store a teacher's log-probabilities for a data set, for `distill(teacher_cache=...)`; return the manifest.

    Raises: PotstillError, as the command line does.
    """

def load(
    model: str | Path,
    *,
    size: float | None = None,
    device: str = "auto",
    dtype: str = "float32",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A model with its tokenizer, as `.model` and `.tokenizer`; every function takes the result as a model.

    `size` is one of an elastic model: `load("DIR", size=0.5)` is `load("DIR#0.5")`, a name that every function takes.

    Raises: NotFound, UnsafeModel, ArtifactError, UnsupportedModel; UsageError for a size that the model has not.
    """

def data(
    source: DataSource,
    *,
    tokenizer: str = "smollm2",
    context: int = 512,
    split: str = "train",
    columns: str = "",
) -> Report:
    """Describe a data set: its kind, size, the share of trained tokens, and examples in trained and other pieces.

    Raises: PotstillError, as the command line does.
    """

def export(
    model: ModelSource,
    *,
    to: str,
    out: str | Path,
    overwrite: bool = False,
    type: str = "f16",
    draft: ModelSource | None = None,
    size: float | None = None,
    check: bool = True,
    save_dtype: str = "bfloat16",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Write `model` in the format of another runtime (hf, gguf, onnx, openvino), and compare its tokens.

    Raises: PotstillError, as the command line does.
    """

def advise(
    model: ModelSource,
    *,
    data: DataSource | Sequence[str | Path],
    draft: ModelSource | Sequence[ModelSource] = ("lookup", "suffix"),
    out: str | Path | None = None,
    overwrite: bool = False,
    chat_template: str | None = None,
    mix_exponent: float = 1.0,
    special_in_text: str = "keep",
    on_bad_row: str = "skip",
    columns: str = "",
    draft_length: str = "1,2,3,4,6,8",
    tree: Sequence[str] = (),
    prompts: int = 8,
    max_tokens: int = 64,
    temperature: float = 0.0,
    check: bool = True,
    runs: int = 3,
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Whether speculative decoding pays for `model` on your prompts, with which `draft` and length.

    `draft` is one drafter or several, as in `generate --draft`; a model may be in memory. The entries are `advice`,
    `settings` with predicted and measured speed-ups, and what the predictions follow from. `out` also keeps them, with
    a chart.

    Raises: PotstillError, as the command line does.
    """

def edit(
    model: ModelSource,
    *,
    facts: DataSource | Sequence[str | Path],
    out: str | Path,
    overwrite: bool = False,
    chat_template: str | None = None,
    special_in_text: str = "keep",
    languages: str = "",
    limit: int | None = None,
    neurons: str = "shared",
    top: int = 200,
    layers: str = "",
    paraphrases: int = 4,
    steps: int = 25,
    lr: float = 0.3,
    clamp: float = 1.0,
    neutral_weight: float = 0.0625,
    similarity: float = 0.0,
    raw: bool = False,
    measure: bool = True,
    max_tokens: int = 24,
    copy_model: bool = False,
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Change single `facts` of `model` in several languages, write the edits to `out`, and return their card.

    The weights stay as they are: `out` names the model, and `generate` applies an edit where a prompt names its
    subject. A model in memory is copied into `out`.

    Raises: PotstillError, as the command line does.
    """

def run(
    recipe: str,
    *,
    out: str | Path,
    tiny: bool = False,
    teacher: ModelSource | None = None,
    data: DataSource | Sequence[str | Path] | None = None,
    preferences: DataSource | Sequence[str | Path] | None = None,
    questions: DataSource | Sequence[str | Path] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    student: ModelSource | None = None,
    judge: str | None = None,
    tokens: int | str | None = None,
    epochs: float | None = None,
    draft_vocabulary: int | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 1,
) -> Report:
    """Run the recipe of a published method, such as "minima"; every stage has a folder in `out`.

    Returns the folder of the last stage, as `out`, and its card. `tiny` tries the method on a tiny budget.

    Raises: PotstillError, as the command line does.
    """
