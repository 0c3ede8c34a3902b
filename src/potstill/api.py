"""The commands as Python functions, with the same options, names and defaults.

Every function takes its options as keywords; `help(potstill.distill)` lists them. A model is a name, a path, what
`potstill.load` returns, or `(model, tokenizer)`. Data is a name, a path, a `datasets.Dataset`, or rows as dicts.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from potstill.core.options import build_options
from potstill.core.results import MeasureTable, Report
from potstill.decode.answer_stream import AnswerStream
from potstill.models.load import LoadedModel
from potstill.models.load_size import load_size
from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.run import run as run
from potstill.stages import generate_options
from potstill.stages import options as stage_options
from potstill.stages.advise import AdviseConfig
from potstill.stages.align.doctor import is_alignment
from potstill.stages.align.options import AlignOptions
from potstill.stages.align.plan import plan_alignment
from potstill.stages.align.run import align_from_options
from potstill.stages.arena.arena import Arena
from potstill.stages.cache_teacher import CacheTeacherConfig
from potstill.stages.caller_objects import DataSource, ModelSource
from potstill.stages.candidates.config import build_dataset_stage
from potstill.stages.candidates.options import CandidateOptions
from potstill.stages.checks.report import FAIL
from potstill.stages.convert import ConvertConfig
from potstill.stages.describe_dataset import describe_dataset
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill as run_distill
from potstill.stages.doctor import Doctor
from potstill.stages.edit import EditConfig
from potstill.stages.edit_options import EditOptions
from potstill.stages.export.export import ExportConfig
from potstill.stages.export.options import ExportOptions
from potstill.stages.frontier import draw_frontier
from potstill.stages.generate_text import generate_text
from potstill.stages.keyword_options import check_generation, choose_budget, take_options
from potstill.stages.measure import MeasureConfig
from potstill.stages.plan.plan import Plan
from potstill.stages.prune import PruneConfig
from potstill.stages.training import TrainingResult


@take_options(stage_options.DistillOptions)
def distill(*, out: str | Path, overwrite: bool = False, resume: bool = False, **options: Any) -> TrainingResult:
    """Train a small student to predict like a teacher, and measure both; write the model and its card to `out`.

    Give several teachers as a sequence of `NAME=TEACHER`, and your own loss as a function or class.

    Raises: PotstillError, as the command line does; UsageError for an unknown option.
    """
    return run_distill(DistillConfig.from_options(options), Path(out), overwrite=overwrite, resume=resume)


@take_options(AlignOptions, leave_out=("train_on",))
def align(
    model: ModelSource,
    *,
    data: DataSource | Sequence[str | Path],
    out: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> TrainingResult:
    """Train `model` with preferences or rewards, and measure it before and after; write it and its card to `out`.

    `objective` is dpo, ipo, simpo, orpo, kto, aligndistil or grpo, with options such as `"dpo:beta=0.1"`.

    Raises: PotstillError, as the command line does; UsageError for an unknown option.
    """
    given = {"model": str(model), "data": data, **options}
    return align_from_options(given, Path(out), overwrite=overwrite, resume=resume)


@take_options(stage_options.PruneOptions)
def prune(model: ModelSource, *, out: str | Path, overwrite: bool = False, **options: Any) -> Report:
    """Prune `model` to a number of parameters, check that it reloads to the same logits, and return its card.

    `shape` gives exact sizes, such as `{"layers": 20, "kv_heads": 3, "ffn": 1024, "hidden": 512}`.

    Raises: PotstillError, as the command line does.
    """
    stage = PruneConfig(model=str(model), **options)
    return Report({"out": str(out), **stage.run(Path(out), overwrite=overwrite).to_dict()})


@take_options(stage_options.ConvertOptions)
def convert(model: ModelSource, *, to: str, out: str | Path, overwrite: bool = False, **options: Any) -> Report:
    """Change what the layers of `model` are, check that it reloads to the same logits, and return its card.

    `to` is a conversion with its options, such as `"deltanet"` or `"experts:experts=4"`; `distill` heals the result.

    Raises: PotstillError, as the command line does.
    """
    stage = ConvertConfig(model=str(model), to=to, **options)
    return Report({"out": str(out), **stage.run(Path(out), overwrite=overwrite).to_dict()})


@take_options(EditOptions, leave_out=EditOptions.unused_options)
def edit(
    model: ModelSource,
    *,
    facts: DataSource | Sequence[str | Path],
    out: str | Path,
    overwrite: bool = False,
    **options: Any,
) -> Report:
    """Change single `facts` of `model` in several languages, write the edits to `out`, and return their card.

    The weights stay as they are: `out` names the model, and `generate` applies an edit where a prompt names its
    subject. A model in memory is copied into `out`.

    Raises: PotstillError, as the command line does.
    """
    sources = tuple(map(str, facts)) if isinstance(facts, list | tuple) else str(facts)
    stage = EditConfig(model=str(model), facts=sources, **options)
    return Report({"out": str(out), **stage.run(Path(out), overwrite=overwrite).to_dict()})


@take_options(stage_options.MeasureOptions)
def measure(*models: ModelSource, out: str | Path | None = None, **options: Any) -> MeasureTable:
    """Measure the quality and speed of models, by name; `out` also keeps the measures as JSON, for `frontier`.

    Raises: PotstillError, as the command line does.
    """
    stage = MeasureConfig(models=tuple(map(str, models)), **options)
    return MeasureTable(stage.run(None if out is None else Path(out))["models"])


def frontier(*sources: str | Path, out: str | Path = "frontier.html", title: str = "Quality against cost") -> Report:
    """Draw measured models on one chart of quality against cost, as HTML and PNG; return its points and files.

    Raises: PotstillError, as the command line does.
    """
    return Report(draw_frontier([Path(source) for source in sources], Path(out), title=title))


@take_options(generate_options.GenerateDatasetOptions, CandidateOptions, generate_options.AnswerOptions)
def generate(
    model: ModelSource,
    prompt: str | None = None,
    *,
    data: DataSource | Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    on_text: Callable[[str], object] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> str | Report:
    """The answer to `prompt`; or answers to all prompts of `data`, written to `out` as a data set, with its card.

    With `select` it draws several samples for each prompt of `data`, and writes what it selects from them.
    `on_text` receives the pieces of the answer to `prompt` as they are written.

    Raises: PotstillError, as the command line does.
    """
    check_generation(prompt=prompt, data=data, out=out, on_text=on_text, **options)
    if data is not None and out is not None:
        values = {"model": str(model), "data": data, **options}
        stage = build_dataset_stage(values)
        return Report({"out": str(out), **stage.run(Path(out), overwrite=overwrite, resume=resume)})

    def read(answer: AnswerStream) -> None:
        for event in answer:
            if on_text is not None and event.text:
                on_text(event.text)

    answer_options = build_options(generate_options.AnswerOptions, options)
    return str(generate_text(str(model), str(prompt), answer_options, read=read)["text"])


@take_options(stage_options.PlanOptions)
def plan(*, out: str | Path = ".", **options: Any) -> Report:
    """Estimate memory, disk and time of `distill` with the same options; it writes nothing.

    With an objective of preferences it is `align` of the `student`, whose reference is the `teacher`.

    Raises: PotstillError, as the command line does.
    """
    rest = {name: options.pop(name) for name in ("measure",) if name in options}
    if is_alignment(options):
        return Report(plan_alignment(options, Path(out), **rest))
    return Report(Plan(distill=DistillConfig.from_options(options), **rest).run(Path(out)))


@take_options(stage_options.DoctorOptions, leave_out=("teacher", "prompts_per_step"))
def doctor(*, teacher: ModelSource | Sequence[str | Path], **options: Any) -> Report:
    """Check that training computes the right loss for your teacher, student and data: `passed`, and all `checks`.

    Raises: PotstillError, as the command line does.
    """
    objective = ObjectiveConfig.from_options(options)
    rest = {name: value for name, value in options.items() if name not in ("objective", "cross_entropy", "temperature")}
    checks = Doctor(teacher=teacher, objective=objective, **rest).run()  # type: ignore[arg-type]
    return Report(
        {"passed": all(c.outcome != FAIL for c in checks), "checks": [Report(check.to_dict()) for check in checks]}
    )


@take_options(stage_options.ArenaOptions, leave_out=("objective", "tokens", "seconds"))
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
    **options: Any,
) -> Report:
    """Train the same student with each of `objectives`, with equal data, seeds and budget, and compare the students.

    The budget is `tokens`, `epochs` or `seconds`; by default 200k tokens.

    Raises: PotstillError, as the command line does.
    """
    rest = {name: options.pop(name) for name in ("prompts",) if name in options}
    stage = Arena(
        common=DistillConfig.from_options(options),
        objectives=tuple(objectives),
        tokens=choose_budget(tokens, seconds, epochs),
        epochs=epochs,
        seconds=seconds,
        seeds=tuple(seeds),
        **rest,
    )
    return Report({"out": str(out), **stage.run(Path(out), overwrite=overwrite, resume=resume, show=False)})


@take_options(stage_options.CacheTeacherOptions)
def cache(
    *, teacher: ModelSource, out: str | Path, overwrite: bool = False, resume: bool = False, **options: Any
) -> Report:
    """Store a teacher's log-probabilities for a data set, for `distill(teacher_cache=...)`; return the manifest.

    Raises: PotstillError, as the command line does.
    """
    stage = CacheTeacherConfig(teacher=str(teacher), **options)
    manifest = stage.run(Path(out), overwrite=overwrite, resume=resume, show=False)
    return Report({"out": str(out), **manifest.to_dict()})


@take_options(AdviseConfig, leave_out=("train_on",))
def advise(
    model: ModelSource,
    *,
    data: DataSource | Sequence[str | Path],
    draft: ModelSource | Sequence[ModelSource] = ("lookup", "suffix"),
    out: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Report:
    """Whether speculative decoding pays for `model` on your prompts, with which `draft` and length.

    `draft` is one drafter or several, as in `generate --draft`; a model may be in memory. The entries are `advice`,
    `settings` with predicted and measured speed-ups, and what the predictions follow from. `out` also keeps them, with
    a chart.

    Raises: PotstillError, as the command line does.
    """
    drafts = tuple(map(str, draft)) if isinstance(draft, list | tuple) else (str(draft),)
    sources = tuple(map(str, data)) if isinstance(data, list | tuple) else str(data)
    stage = AdviseConfig(model=str(model), data=sources, draft=drafts, **options)
    return Report(stage.run(None if out is None else Path(out), overwrite=overwrite))


@take_options(ExportOptions)
def export(model: ModelSource, *, to: str, out: str | Path, overwrite: bool = False, **options: Any) -> Report:
    """Write `model` in the format of another runtime (hf, gguf, onnx, openvino), and compare its tokens.

    Raises: PotstillError, as the command line does.
    """
    stage = ExportConfig(model=str(model), to=to, **options)
    return Report(stage.run(Path(out), overwrite=overwrite))


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
    return load_size(
        model, size, device=device, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )


@take_options()
def data(
    source: DataSource, *, tokenizer: str = "smollm2", context: int = 512, split: str = "train", columns: str = ""
) -> Report:
    """Describe a data set: its kind, size, the share of trained tokens, and examples in trained and other pieces.

    Raises: PotstillError, as the command line does.
    """
    return Report(describe_dataset(str(source), tokenizer, context=context, split=split, columns=columns))
