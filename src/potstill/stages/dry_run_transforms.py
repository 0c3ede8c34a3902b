"""`--dry-run` of the stages that transform a model: prune, convert and edit."""

from pathlib import Path
from typing import Any

import torch

from potstill.data.facts import count_missing_subjects, list_languages
from potstill.evaluate.editing import list_questions
from potstill.evaluate.size import count_blueprint_parameters
from potstill.models.backbone import Backbone
from potstill.models.quantization import check_trainable
from potstill.stages.convert import ConvertConfig, describe_conversion
from potstill.stages.corpus import load_data
from potstill.stages.dry_run import (
    describe_corpus,
    describe_job,
    describe_shape,
    leave_untouched,
    read_spec,
)
from potstill.stages.edit import EditConfig
from potstill.stages.option_checks import check_single_process
from potstill.stages.prune import PruneConfig
from potstill.stages.run_folder import reserve_output
from potstill.transforms.fit import resize_blueprint


def preview_prune(config: PruneConfig, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """The shape and the parameters of the pruned model, and the text of its calibration.

    Raises: as `PruneConfig.run` does before it loads the model.
    """
    check_single_process()
    with reserve_output(out, config.inputs, overwrite=overwrite, recover=leave_untouched):
        check_trainable(config.model, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)
        blueprint = read_spec(config, config.model).blueprint
        with torch.device("meta"):
            backbone = Backbone(blueprint)
        target = config.compute_target_shape(backbone)
        student = describe_shape(resize_blueprint(blueprint, target))
        data = describe_corpus(load_data(config))
    share = student["parameters"] / count_blueprint_parameters(blueprint).total
    return {**describe_job(config, out, config.model), "student": {**student, "share": share}, "data": data}


def preview_convert(config: ConvertConfig, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Parameters, FLOPs and bytes of states before and after the conversion, and the text of its calibration.

    Raises: as `ConvertConfig.run` does before it loads the model.
    """
    check_single_process()
    with reserve_output(out, config.inputs, overwrite=overwrite, recover=leave_untouched):
        check_trainable(config.model, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)
        facts = describe_conversion(read_spec(config, config.model).blueprint, config.conversion)
        data = {"data": describe_corpus(load_data(config))} if config.conversion.reads_text else {}
    return {**describe_job(config, out, config.model), **facts, **data}


def preview_edit(config: EditConfig, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """The facts by language, the questions that are asked of each model, and those that do not name their subject.

    Raises: as `EditConfig.run` does before it loads the model.
    """
    check_single_process()
    with reserve_output(out, config.inputs, overwrite=overwrite, recover=leave_untouched):
        facts, origin = config.load_facts(), config.find_base()
    bare_texts = [text for fact in facts for text in fact.values() if not text.paraphrases]
    return {
        **describe_job(config, out, origin.base),
        "edits_before": len(origin.edits),
        "facts": len(facts),
        "languages": {language: sum(language in fact for fact in facts) for language in list_languages(facts)},
        "questions_without_subject": count_missing_subjects(facts),
        "paraphrases_to_write": config.paraphrases * len(bare_texts),
        "questions_to_answer": len(list_questions(facts)) if config.measure else 0,
    }
