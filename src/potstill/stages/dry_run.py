"""What a stage will read, make and write, as plain data: `--dry-run`. Nothing is trained, and no model is loaded.

Each function makes the checks that its stage makes before it loads a model, so the same errors come early.
"""

import contextlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from datasets import Dataset

from potstill.core.atomic_files import ARENA_FILE, CARD_FILE, TRAINING_FOLDER
from potstill.core.blueprint import Blueprint
from potstill.core.errors import NotFound, UnsupportedModel
from potstill.data.corpus import Corpus
from potstill.data.mixture import load_mixture
from potstill.data.preferences import load_preferences
from potstill.evaluate.size import count_blueprint_parameters
from potstill.models.locate import locate_model
from potstill.models.spec import ModelSpec, read_model_spec
from potstill.stages.advise import AdviseConfig
from potstill.stages.arena.arena import Arena
from potstill.stages.cache_packs import load_packs
from potstill.stages.cache_teacher import CacheTeacherConfig
from potstill.stages.candidates.config import CandidatesConfig
from potstill.stages.corpus import load_data
from potstill.stages.dataset import load_tokenizer, prepare_dataset
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.ensemble import TeacherSource
from potstill.stages.distill.models import check_student, open_caches
from potstill.stages.distill.prepare import make_dataset_config
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.measure import MeasureConfig
from potstill.stages.option_checks import check_single_process
from potstill.stages.plan.inputs import read_inputs
from potstill.stages.plan.plan import Plan
from potstill.stages.resources.report import check_disk
from potstill.stages.run_folder import reserve_output
from potstill.stages.run_notes import report_passes
from potstill.stages.text_options import prepare_tokenizer
from potstill.teachers.cached import MANIFEST
from potstill.teachers.http_client import is_address
from potstill.transforms.fit import get_shape


def preview_distill(
    config: DistillConfig, out: Path, *, overwrite: bool = False, resume: bool = False
) -> dict[str, Any]:
    """The models, the text, the steps, and the memory and disk in bytes of `config` in `out`.

    The shape of the student, memory and disk are None where no blueprint describes a model. They are None as well where
    the first teacher is a server or a cache.

    Raises: as `distill` does before it loads a model; ArtifactError for a full disk.
    """
    check_single_process()
    options = config.to_dict()
    with reserve_output(
        out, config.inputs, overwrite=overwrite, resume=resume, options=options, recover=leave_untouched
    ):
        check_student(config)
        resources, facts, num_packs = _plan(config, out)
    settings = config.settings.resolve_epochs(num_packs)
    tokens = config.settings.count_tokens(facts["tokens"])
    report_passes(config.settings, facts["tokens"])
    return {
        "stage": options,
        "out": str(out),
        "teacher": [_locate_teacher(source) for source in config.teachers],
        "student": {"model": config.student and locate(config.student), **resources.get("student", {})},
        "objective": " + ".join(f"{part.weight:g} * {part.term.label}" for part in config.objective.terms),
        "data": facts,
        "training": {"tokens": tokens, "steps": settings.steps, "passes": tokens / facts["tokens"]},
        "memory": resources.get("memory"),
        "disk": resources.get("disk"),
    }


def _plan(config: DistillConfig, out: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The student, memory and disk of a run, as far as they are known; its text, and the number of packs."""
    if config.teachers[0].kind == "local":
        try:
            inputs = read_inputs(config)
        except UnsupportedModel:  # a family that is trained, and that no blueprint describes
            if config.student is None:
                raise
        except NotFound:  # a teacher whose cache replaces it
            if config.student is None or config.teachers[0].cache is None:
                raise
        else:
            report = Plan(distill=config, measure=False).report(inputs, out)
            check_disk(report["disk"]["most"], report["room"]["disk"], out)
            resources = {
                "student": describe_shape(inputs.student),
                "memory": {"peak": report["memory"]["peak"], "free": report["room"]["memory"]},
                "disk": {**report["disk"], "free": report["room"]["disk"]},
            }
            return resources, describe_text(inputs.facts), len(inputs.packs)
    assert config.student is not None
    tokenizer, caches = load_tokenizer(config.student), list(open_caches(config).values())
    prepare_tokenizer(tokenizer, config)
    dataset = prepare_dataset(
        make_dataset_config(config),
        tokenizer,
        tokens=config.settings.tokens,
        documents=config.documents,
        caches=caches,
    )
    return {}, describe_text(dataset.facts), len(dataset.packs)


def preview_cache(
    config: CacheTeacherConfig, out: Path, *, overwrite: bool = False, resume: bool = False
) -> dict[str, Any]:
    """The teacher, and the text with the tokens and windows that its cache will hold.

    Raises: as `CacheTeacherConfig.run` does before it loads the teacher.
    """
    check_single_process()
    with _check_output(config, out, overwrite=overwrite, resume=resume, marker=MANIFEST):
        tokenizer = read_spec(config, config.teacher).tokenizer
        prepare_tokenizer(tokenizer, config)
        packs, facts = load_packs(config, tokenizer)
    data = {**describe_text(facts), "windows": len(packs.lengths), "rows": packs.num_trained}
    return {**describe_job(config, out, config.teacher), "data": data}


def preview_answers(
    config: GenerateDatasetConfig | CandidatesConfig, out: Path, *, overwrite: bool = False, resume: bool = False
) -> dict[str, Any]:
    """The model, and the number of prompts that it will answer.

    Raises: as the stage does before it loads the model.
    """
    check_single_process()
    if isinstance(config, CandidatesConfig):
        return preview_candidates(config, out, overwrite=overwrite, resume=resume)
    with _check_output(config, out, overwrite=overwrite, resume=resume, marker=CARD_FILE):
        corpus = load_data(config)
        prompts = len(config.select_documents(corpus))
    return {**describe_job(config, out, config.model), "data": {**describe_corpus(corpus), "prompts": prompts}}


def preview_candidates(
    config: CandidatesConfig, out: Path, *, overwrite: bool = False, resume: bool = False
) -> dict[str, Any]:
    """The model, the number of prompts, and the samples of each.

    Raises: as `CandidatesConfig.run` does before it loads the model.
    """
    config.build_reward()
    with _check_output(config, out, overwrite=overwrite, resume=resume, marker=CARD_FILE):
        data = config.load_questions()
    facts = {"name": data.name, "prompts": len(data.train), "held_out": len(data.validation)}
    return {**describe_job(config, out, config.model), "data": {**facts, "samples": config.samples}}


def preview_arena(arena: Arena, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """The arms with their tokens and seconds, as `Arena.estimate` gives them.

    Raises: as `Arena.run` does before anything is trained.
    """
    check_single_process()
    with reserve_output(
        out,
        arena.common.inputs,
        overwrite=overwrite,
        resume=resume,
        resumable=(ARENA_FILE,),
        recover=leave_untouched,
    ):
        return arena.estimate()


def preview_measure(config: MeasureConfig) -> dict[str, Any]:
    """The models with their places, and the text that they are measured on.

    Raises: as `MeasureConfig.run` does before it loads a model.
    """
    config.inputs.check()
    models = {name: locate(name) for name in filter(None, (*config.models, config.teacher, config.reference))}
    load = load_mixture if config.reference is None else load_preferences
    corpus = load_data(config, split=config.split, load=load)
    return {"stage": config.to_dict(), "model": models, "data": describe_corpus(corpus)}


def preview_advise(config: AdviseConfig, out: Path | None, *, overwrite: bool = False) -> dict[str, Any]:
    """The model, the data, and the settings that `advise` will try.

    Raises: as `AdviseConfig.run` does before it loads a model.
    """
    check_single_process()
    with contextlib.ExitStack() as stack:
        if out is None:
            config.inputs.check()
        else:
            stack.enter_context(reserve_output(out, config.inputs, overwrite=overwrite, recover=leave_untouched))
        data = describe_corpus(load_data(config, split="all"))
    settings = [setting.flags for setting in config.list_settings()]
    return {"stage": config.to_dict(), "model": locate(config.model), "data": data, "settings": settings}


def locate(name: str) -> str:
    """The path of a model, or the address of a served one. Raises: NotFound, ArtifactError."""
    return name if is_address(name) else str(locate_model(name))


def _locate_teacher(source: TeacherSource) -> str | None:
    """The place of a teacher, or of the cache that replaces it. Raises: NotFound, ArtifactError."""
    if source.location is None:
        return source.cache
    try:
        return locate(source.location)
    except NotFound:
        if source.cache is None:
            raise
        return source.cache


def describe_shape(blueprint: Blueprint) -> dict[str, int]:
    """`layers`, the widths of a layer and `hidden` where all layers are alike; and the stored `parameters`."""
    try:
        shape: Mapping[str, int] = get_shape(blueprint)
    except UnsupportedModel:
        shape = {"layers": len(blueprint.layers), "hidden": blueprint.hidden}
    return {**shape, "parameters": count_blueprint_parameters(blueprint).total}


def describe_corpus(corpus: Corpus) -> dict[str, Any]:
    """Name, kind, columns and number of documents (None for a stream) of a corpus."""
    documents = len(corpus) if isinstance(corpus.documents, Dataset) else None
    return {
        "name": corpus.name,
        "kind": corpus.kind,
        "columns": _list_columns(corpus.provenance),
        "documents": documents,
    }


def describe_text(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The text of a run from the facts of its card."""
    text = {
        "name": facts["trained_on"],
        "kind": facts["kind"],
        "columns": _list_columns(facts["provenance"]),
        **{name: facts[name] for name in ("documents", "tokens", "trained_share")},
    }
    return {**text, "measured_on": facts["measured_on"]} if "measured_on" in facts else text


def _list_columns(provenance: Mapping[str, Any]) -> list[str]:
    columns: Iterable[str] = provenance.get("read_columns", ())
    return list(dict.fromkeys(columns))


def describe_job(config: Any, out: Path, model: str) -> dict[str, Any]:
    return {"stage": config.to_dict(), "out": str(out), "model": locate(model)}


def read_spec(config: Any, name: str) -> ModelSpec:
    return read_model_spec(name, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)


def _check_output(
    config: CacheTeacherConfig | GenerateDatasetConfig | CandidatesConfig,
    out: Path,
    *,
    overwrite: bool,
    resume: bool,
    marker: str,
) -> AbstractContextManager[None]:
    """Make the checks of a stage on its inputs and on `out`, whose file `marker` says that it is complete."""
    return reserve_output(
        out,
        config.inputs,
        overwrite=overwrite,
        resume=resume,
        options=config.to_dict(),
        resumable=(TRAINING_FOLDER, marker),
        recover=leave_untouched,
    )


def leave_untouched(out: Path) -> None:
    """Mend nothing that a killed process left; the run itself does."""
