"""Convert: changes what the layers of a model are, saves the result, and compares its logits after a reload."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from potstill.core.blueprint import Blueprint
from potstill.core.card import Card
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.elastic import Size, read_sizes
from potstill.core.types import Batch, move_batch
from potstill.data.row_reader import Language
from potstill.evaluate.size import (
    count_blueprint_parameters,
    count_state_bytes,
    count_state_growth,
    count_weight_bytes,
    forward_flops,
)
from potstill.models.families.registry import export_model, import_model
from potstill.models.load import LoadedModel
from potstill.stages.console import get_command
from potstill.stages.option_checks import check_save_dtype, check_single_process
from potstill.stages.options import ConvertOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import reserve_output
from potstill.stages.stage import make_parent, to_plain_dict
from potstill.stages.transform import autocast, load_calibration_text, load_original, write_transformed_model
from potstill.transforms.convert.conversion import Conversion
from potstill.transforms.convert.registry import parse_conversion


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ConvertOptions):
    """Changes what the layers of `model` are, starting from its weights; `distill` then heals the result.

    `to` is a conversion with its options, such as `deltanet` or `experts:experts=4`. A conversion that reads text
    measures on `calibration_tokens` of `data`.
    """

    kind: ClassVar[str] = "convert"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_save_dtype(self.save_dtype)
        _ = self.conversion

    @cached_property
    def conversion(self) -> Conversion:
        """The conversion. Raises: UsageError for an unknown name or option."""
        return parse_conversion(self.to)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> Card:
        """Converts, saves, reloads and compares the logits; the folder appears only if all steps succeed.

        Raises: UsageError, NotFound, UnsupportedModel, OutputExists before anything is written.
        """
        check_single_process()
        with reserve_output(out, self.inputs, overwrite=overwrite):
            loaded = load_original(self)
            backbone = import_model(loaded.model)
            self.conversion.blueprint(backbone.blueprint)  # refuses a model that it does not fit, before text is read
            batches, data = self._load_batches(loaded, backbone.blueprint)
            device = resolve_device(self.device)
            with autocast(device, resolve_dtype(self.dtype, device_type=str(device))):
                batches = [move_batch(batch, device) for batch in batches]
                converted, decisions = self.conversion.convert(backbone.to(device), batches)
            facts = describe_conversion(backbone.blueprint, self.conversion, converted.blueprint)
            model = export_model(converted.cpu(), loaded.model)
            card = Card(
                stage=self.to_dict(),
                seed=self.seed,
                parents=[make_parent("converted from", loaded)],
                data=data,
                details={**facts, **decisions},
                command=get_command(),
            )
            return write_transformed_model(self, model, loaded, card, out, overwrite=overwrite)

    def _load_batches(self, loaded: LoadedModel, blueprint: Blueprint) -> tuple[list[Batch], dict[str, Any]]:
        """The calibration text and its facts; nothing for a conversion that reads none."""
        if not self.conversion.reads_text:
            return [], {}
        column = self.conversion.language_column
        label = None if column is None else Language(column)
        return load_calibration_text(self, loaded, blueprint, label=label)

    @property
    def inputs(self) -> StageInputs:
        """The inputs of the stage."""
        data = (self.data,) if self.conversion.reads_text else ()
        return StageInputs(models=(self.model,), data=data, origin=self.model, share=1.0)

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return to_plain_dict(self)


def describe_conversion(old: Blueprint, conversion: Conversion, new: Blueprint | None = None) -> dict[str, Any]:
    """Parameters, FLOPs per token and bytes of states and weights in bf16, at the end of the context, before and after.

    `new` is the result of the conversion, by default what it plans without text.

    Raises: UsageError if the conversion does not fit the model.
    """
    new = new or conversion.blueprint(old)
    parameters = count_blueprint_parameters(new).total
    tokens = new.context
    sizes = {"sizes": [describe_size(size, new) for size in read_sizes(new)]} if read_sizes(new) else {}
    return {
        "conversion": {"name": conversion.name, **conversion.describe_options()},
        "parameters": parameters,
        "share": parameters / count_blueprint_parameters(old).total,
        "context": tokens,
        "flops_per_token": {
            "before": forward_flops(old, float(tokens)).total,
            "after": forward_flops(new, float(tokens)).total,
        },
        "state_bytes": {"before": count_state_bytes(old, tokens), "after": count_state_bytes(new, tokens)},
        "state_bytes_per_token": {
            "before": count_state_growth(old, tokens),
            "after": count_state_growth(new, tokens),
        },
        "weight_bytes": {"before": count_weight_bytes(old), "after": count_weight_bytes(new)},
        **sizes,
    }


def describe_size(size: Size, whole: Blueprint) -> dict[str, Any]:
    """A size of an elastic model: layers, units, parameters, their share in the layers, FLOPs and bytes of states."""
    part = size.blueprint(whole)
    parameters, tokens = count_blueprint_parameters(part), whole.context
    return {
        "share": size.share,
        "layers": len(size.layers),
        **dict(size.units),
        "parameters": parameters.total,
        "share_of_blocks": parameters.blocks / count_blueprint_parameters(whole).blocks,
        "flops_per_token": forward_flops(part, float(tokens)).total,
        "state_bytes": count_state_bytes(part, tokens),
    }
