"""`--dry-run` of the stages that transform a model: prune and convert."""

from pathlib import Path
from typing import Any

import torch

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
