"""Prune: cuts a model to a number of parameters, saves it in its family, and compares its logits after a reload."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from potstill.core.card import Card
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import InfeasibleTarget
from potstill.core.types import move_batch
from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model, import_model
from potstill.models.load import LoadedModel
from potstill.stages.console import get_command
from potstill.stages.option_checks import (
    check_choice,
    check_save_dtype,
    check_single_process,
    check_size_options,
    check_strategy,
)
from potstill.stages.options import PruneOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import reserve_output
from potstill.stages.stage import make_parent, to_plain_dict
from potstill.stages.transform import autocast, load_calibration_text, load_original, write_transformed_model
from potstill.transforms.fit import AUTO, Shape, count_parameters, fit_shape, get_dimensions
from potstill.transforms.shrink import shrink


@dataclass(frozen=True, kw_only=True)
class PruneConfig(PruneOptions):
    """Removes layers, by measured harm or evenly, and units and hidden coordinates, by their importance on `data`.

    All layers get the same widths, so the model stays in its family. The parts of the model declare the units: for
    Llama key/value heads with their queries, and neurons. The size comes from one of `keep` (share of all stored
    parameters), `params`, or `shape` alone.
    Source: MiniMA (arXiv:2311.07052), section 3. Ours: layers by harm, and what `strategy="auto"` cuts (see
    `transforms.fit.get_dimensions`).
    """

    kind: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size_options({"keep": self.keep, "params": self.params}, has_alternative=bool(self.shape))
        check_strategy(self.strategy)
        check_choice("layers-by", self.layers_by, ("harm", "evenly"))
        check_save_dtype(self.save_dtype)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> Card:
        """Prunes, saves, reloads and compares the logits; the folder appears only if all steps succeed.

        Raises: UsageError, InfeasibleTarget, NotFound, OutputExists before anything is written.
        """
        check_single_process()
        with reserve_output(out, self.inputs, overwrite=overwrite):
            loaded = load_original(self)
            student, card = self.apply(loaded)
            return write_transformed_model(self, student, loaded, card, out, overwrite=overwrite)

    @property
    def inputs(self) -> StageInputs:
        """The inputs of the stage, and the share of the model that it writes."""
        return StageInputs(models=(self.model,), data=(self.data,), origin=self.model, share=self.keep or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return to_plain_dict(self)

    def apply(self, loaded: LoadedModel) -> tuple[PreTrainedModel, Card]:
        """The pruned model in memory, as its stock family, and its card, which lists the removed parts."""
        backbone = import_model(loaded.model)
        target = self.compute_target_shape(backbone)
        batches, facts = load_calibration_text(self, loaded, backbone.blueprint)
        device = resolve_device(self.device)
        with autocast(device, resolve_dtype(self.dtype, device_type=str(device))):
            batches = [move_batch(batch, device) for batch in batches]
            pruned_model, decisions = shrink(backbone.to(device), target, batches, layers_by=self.layers_by)
        details = {
            "shape": dict(target),
            "parameters": count_parameters(pruned_model.blueprint),
            "share": count_parameters(pruned_model.blueprint) / count_parameters(backbone.blueprint),
            **decisions,
        }
        card = Card(
            stage=to_plain_dict(self),
            seed=self.seed,
            parents=[make_parent("pruned from", loaded)],
            data=facts,
            details=details,
            command=get_command(),
        )
        return export_model(pruned_model.cpu(), loaded.model), card

    def compute_target_shape(self, backbone: Backbone) -> Shape:
        """The shape that the options request.

        Raises:
            InfeasibleTarget: no shape meets the options.
            UnsupportedModel: the model's layers are of several kinds or widths.
            UsageError: an option is out of range, or names no dimension of this model.
        """
        blueprint = backbone.blueprint
        if self.params is not None and self.params > count_parameters(blueprint):
            raise InfeasibleTarget(
                f"{self.params:,} parameters are more than the model's {count_parameters(blueprint):,}; ask for fewer"
            )
        share = 1.0 if self.params is None else self.params / count_parameters(blueprint)
        # where some sizes are given, all others may have to follow
        has_free_sizes = self.strategy == AUTO and self.shape
        share = share if self.keep is None else self.keep
        dims = None if has_free_sizes else get_dimensions(blueprint, self.strategy, share)
        return fit_shape(blueprint, keep=self.keep, params=self.params, dims=dims, exact_sizes=dict(self.shape))
