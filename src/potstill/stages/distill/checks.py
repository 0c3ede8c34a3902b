"""The quick checks of `potstill doctor`, run on the models and the text of a distillation before it trains."""

from collections.abc import Mapping

import torch

from potstill.core.screen import status
from potstill.models.load import LoadedModel
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.checks.cross_tokenizer import run_cross_tokenizer_checks
from potstill.stages.checks.inputs import build_check_inputs, build_cross_tokenizer_inputs
from potstill.stages.checks.report import NOTE, raise_if_failed, run_checks
from potstill.stages.checks.same_tokenizer import QUICK_CHECKS, SHARED_VOCABULARY
from potstill.stages.console import print_note
from potstill.stages.dataset import PreparedDataset
from potstill.stages.model_pair import ModelPair
from potstill.teachers.cached import TeacherCache
from potstill.teachers.external import ExternalTeacher
from potstill.train.training_module import TrainingModule


@status("checking the loss")
def run_quick_checks(
    pair: ModelPair,
    dataset: PreparedDataset,
    module: TrainingModule,
    objective: ObjectiveConfig,
    *,
    dtype: torch.dtype,
    caches: Mapping[str, TeacherCache],
) -> list[dict[str, str]]:
    """The records of the checks, for the card; each teacher of several has checks of its own.

    Raises: CheckFailed with the first check that does not pass.
    """
    kind = dataset.facts["kind"]
    if pair.uses_teacher_tokens:
        inputs = build_cross_tokenizer_inputs(pair, dataset.packs, module, kind=kind)
        checks = list(run_cross_tokenizer_checks(inputs, quick=True))
        for check in (check for check in checks if check.outcome == NOTE):
            print_note(f"{check.name}: {check.found}")
        return raise_if_failed(checks)
    records: list[dict[str, str]] = []
    for network, teacher in pair.teachers.items():
        if isinstance(teacher, ExternalTeacher):
            shared = {
                "name": label_check(network, SHARED_VOCABULARY),
                "outcome": f"{teacher.proof}, {pair.vocabulary:,} shared",
            }
            records.insert(0, shared)
    comparable = {} if pair.is_cross_tokenizer else pair.loaded_teachers
    checked: Mapping[str, LoadedModel | None] = comparable or {"teacher": None}
    for network, loaded in checked.items():
        check_inputs = build_check_inputs(
            dataset.packs,
            student=pair.student,
            student_tokenizer=pair.origin.tokenizer,
            teacher=loaded.model if loaded else None,
            teacher_tokenizer=loaded.tokenizer if loaded else None,
            vocabulary=pair.vocabulary,
            kind=kind,
            compute_dtype=dtype,
            cache=caches.get("teacher"),
            logit_objective=objective.logit_objective,
        )
        results = raise_if_failed(list(run_checks(check_inputs, QUICK_CHECKS)))
        records += [{**record, "name": label_check(network, record["name"])} for record in results]
    return records


def label_check(network: str, name: str) -> str:
    """The name of a check, with the name of the teacher behind it where there are several."""
    teacher = network.removeprefix("teacher").strip()
    return f"{name} ({teacher})" if teacher else name
