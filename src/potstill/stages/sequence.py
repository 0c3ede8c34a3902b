"""Run the stages of a recipe one after another, each into a folder of its own."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import CARD_FILE, TRAINING_FOLDER
from potstill.core.card import read_card
from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.measure import Measure
from potstill.models.spec import read_model_spec
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.prompts import limit_prompts_per_step
from potstill.stages.align.run import align
from potstill.stages.candidates.config import CandidatesConfig
from potstill.stages.console import print_note
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.edit import EditConfig
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.medusa.config import MedusaConfig
from potstill.stages.medusa.run import train_medusa
from potstill.stages.preflight import StageInputs
from potstill.stages.prune import PruneConfig
from potstill.stages.run_folder import reserve_output
from potstill.stages.skip_layers import SkipLayersConfig
from potstill.stages.spec_game import SpecGameConfig
from potstill.stages.stage import reproducible_options

Stage = (
    PruneConfig
    | ConvertConfig
    | GenerateDatasetConfig
    | CandidatesConfig
    | DistillConfig
    | AlignConfig
    | MedusaConfig
    | SkipLayersConfig
    | SpecGameConfig
    | EditConfig
)
PREVIOUS_FOLDER = "@previous"  # in a recipe: the folder of the stage before
STAGE_FOLDER = re.compile(r"@(\d+)")  # in a recipe: the folder of a stage by its number


@dataclasses.dataclass(frozen=True)
class StageResult:
    """The folder and the card of the last stage."""

    out: Path
    card: Mapping[str, Any]

    @property
    def measures(self) -> dict[str, list[Measure]]:
        """The measures of the card by model name, as in `TrainingResult`."""
        return {name: [Measure(**m) for m in model_measures] for name, model_measures in self.card["measures"].items()}

    def to_dict(self) -> dict[str, Any]:
        """The folder and its card, for JSON."""
        return {"out": str(self.out), **self.card}


def run_stages(stages: Sequence[Stage], out: Path, *, overwrite: bool = False, resume: bool = False) -> StageResult:
    """Run `stages` into `out`/1-prune, `out`/2-distill, ...; with `resume`, finished stages are not run again.

    A step of GRPO takes all prompts of its data where the stage asks for more.

    Raises: UsageError without a stage, or for an alignment of a longer context than its model has; OutputExists; the
        errors of the stages.
    """
    if not stages:
        raise UsageError("the recipe has no stages; give at least one")
    resumable = (f"*/{TRAINING_FOLDER}", f"*/{CARD_FILE}")
    with reserve_output(out, collect_inputs(stages), overwrite=overwrite, resume=resume, resumable=resumable):
        check_contexts(stages)
        folders: list[Path] = []
        unchanged = resume
        for number, stage in enumerate(stages, 1):
            folder = out / f"{number}-{stage.kind}"
            resolved_stage = resolve_folders(stage, folders)
            if isinstance(resolved_stage, AlignConfig):
                resolved_stage = limit_prompts_per_step(resolved_stage)
            unchanged = unchanged and is_finished(folder, resolved_stage)
            if unchanged:
                report_newer_data(resolved_stage, folder)
            else:
                run_stage(resolved_stage, folder, overwrite=overwrite, resume=resume and folder.exists())
            folders.append(folder)
        return StageResult(folders[-1], read_card(folders[-1]))


def collect_inputs(stages: Sequence[Stage]) -> StageInputs:
    """What all stages read, without the folders that the stages before them write."""
    stage_inputs = [stage.inputs for stage in stages]
    models = tuple(name for inputs in stage_inputs for name in inputs.models if not is_stage_folder(name))
    data = tuple(name for inputs in stage_inputs for name in inputs.data if not is_stage_folder(name))
    packages = tuple(package for inputs in stage_inputs for package in inputs.packages)
    return StageInputs(models=models, data=data, packages=packages)


def check_contexts(stages: Sequence[Stage]) -> None:
    """Refuse a later alignment whose context is longer than that of the model with which the stages begin.

    Raises: UsageError.
    """
    for number, stage in enumerate(stages, 1):
        model = find_first_model(stages, number) if isinstance(stage, AlignConfig) else None
        if not isinstance(stage, AlignConfig) or model is None:
            continue
        try:
            context = read_model_spec(
                model, allow_pickle=stage.allow_pickle, trust_remote_code=stage.trust_remote_code
            ).blueprint.context
        except UnsupportedModel:  # the stage itself knows more
            continue
        if stage.settings.context > context:
            raise UsageError(
                f"stage {number} aligns in a context of {stage.settings.context:,} tokens, and {model} has one of "
                f"{context:,}; choose another --teacher, or convert it by --to longer"
            )


def find_first_model(stages: Sequence[Stage], number: int) -> str | None:
    """The name of the model whose weights stage `number` trains, over the stages before; None if one changes it."""
    while isinstance(stage := stages[number - 1], AlignConfig | DistillConfig):
        model = stage.model if isinstance(stage, AlignConfig) else stage.student
        if not is_stage_folder(model):
            return model
        number = number - 1 if model == PREVIOUS_FOLDER else int(str(model).removeprefix("@"))
    return None


def run_stage(stage: Stage, out: Path, *, overwrite: bool, resume: bool) -> None:
    """Run one stage into `out`."""
    if isinstance(stage, DistillConfig):
        distill(stage, out, overwrite=overwrite, resume=resume)
    elif isinstance(stage, AlignConfig):
        align(stage, out, overwrite=overwrite, resume=resume)
    elif isinstance(stage, MedusaConfig):
        train_medusa(stage, out, overwrite=overwrite, resume=resume)
    else:
        stage.run(out, overwrite=overwrite, resume=resume)


def report_newer_data(stage: Stage, folder: Path) -> None:
    """Note the files of data that changed after a finished stage read them."""
    finished = (folder / CARD_FILE).stat().st_mtime
    for name in stage.inputs.data_names:
        if (path := Path(name)).is_file() and path.stat().st_mtime > finished:
            print_note(f"{folder.name} is finished, though {name} has changed since; --overwrite runs all stages again")


def is_finished(folder: Path, stage: Stage) -> bool:
    """Whether `folder` holds the finished output of exactly this stage, and no newer unfinished run."""
    if not (folder / CARD_FILE).is_file() or (folder / TRAINING_FOLDER).is_dir():
        return False
    card_options = read_card(folder).get("stage", {})
    return reproducible_options(card_options) == reproducible_options(
        _drop_newer_defaults(card_options, stage, stage.to_dict())
    )


def _drop_newer_defaults(card_options: Mapping[str, Any], config: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """`plain` without options at their default that the card lacks: an older version wrote it."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    newer_names = {name for name in defaults.keys() - card_options.keys() if getattr(config, name) == defaults[name]}
    options = {name: option for name, option in plain.items() if name not in newer_names}
    for name, option in options.items():
        if dataclasses.is_dataclass(nested_config := getattr(config, name, None)) and isinstance(
            card_options.get(name), Mapping
        ):
            options[name] = _drop_newer_defaults(card_options[name], nested_config, option)
    return options


def name_stage_folder(number: int) -> str:
    """The name, in a recipe, of the folder of the stage with this number; the first is 1."""
    return f"@{number}"


def is_stage_folder(name: object) -> bool:
    """Whether a recipe's name for a model or data is the folder of an earlier stage."""
    return name == PREVIOUS_FOLDER or (isinstance(name, str) and STAGE_FOLDER.fullmatch(name) is not None)


def resolve_folders(stage: Stage, folders: Sequence[Path]) -> Stage:
    """`stage` with the folders of the stages before in place of their names."""
    names = {name_stage_folder(number): str(folder) for number, folder in enumerate(folders, 1)}
    names |= {PREVIOUS_FOLDER: str(folders[-1])} if folders else {}
    replacements: dict[str, Any] = {}
    for f in dataclasses.fields(stage):
        value = getattr(stage, f.name)
        if isinstance(value, str) and value in names:
            replacements[f.name] = names[value]
        elif isinstance(value, tuple) and not names.keys().isdisjoint(value):
            replacements[f.name] = tuple(names.get(name, name) for name in value)
    return dataclasses.replace(stage, **replacements)
