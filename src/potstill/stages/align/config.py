"""The options of an alignment, as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from potstill.core.errors import UsageError
from potstill.core.options import build_options
from potstill.objectives.config import ObjectiveConfig, is_sum
from potstill.objectives.options import ObjectiveChoice
from potstill.stages.align.options import LEARNING_RATE, LORA_LEARNING_RATE, AlignOptions, AlignTrainConfig
from potstill.stages.align.validation import check_data, check_networks, check_objective, check_sampling
from potstill.stages.distill.validation import check_documents, check_lora_rank, check_tracker, check_trained_names
from potstill.stages.option_checks import check_save_dtype
from potstill.stages.preflight import StageInputs
from potstill.stages.stage import to_plain_dict
from potstill.teachers.cached import is_cache


@dataclass(frozen=True, kw_only=True)
class AlignConfig(AlignOptions):
    """Train `model` on `data` under `objective`, which reads preferences, single answers with labels, or prompts.

    The frozen `reference` is the model before training by default, in the model's own precision. With `lora` it is the
    model without its adapter, and takes no memory; `reference_cache` takes the place of its forward pass.

    Raises: UsageError for an option out of its range, or options that contradict one another.
    """

    kind: ClassVar[str] = "align"
    settings: AlignTrainConfig = field(default_factory=AlignTrainConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_data(self.data)
        check_objective(self.loss)
        check_networks(self, self.loss)
        check_sampling(self, self.loss)
        check_lora_rank(self.lora)
        check_trained_names(self.train, lora=self.lora)
        check_documents(self.documents)
        check_save_dtype(self.save_dtype)
        for tracker in self.settings.report_to:
            check_tracker(tracker)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "AlignConfig":
        """The config with these options (of the command line, a YAML file or Python), and defaults for all others.

        The default learning rate depends on `lora`.

        Raises: UsageError if an option has an invalid value, or no model is given.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if "model" not in given:
            raise UsageError("no model is given; give MODEL, such as smollm2")
        given.setdefault("lr", LORA_LEARNING_RATE if given.get("lora") else LEARNING_RATE)
        if "epochs" in given:
            given["epochs"] = float(given["epochs"])  # 2 in Python, 2.0 on the command line
        if not isinstance(data := given.get("data", ""), str):
            given["data"] = tuple(data) if len(data) > 1 else next(iter(data), "")
        given["report_to"] = tuple(given.get("report_to", ()))
        return build_options(cls, given)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data."""
        return to_plain_dict(self)

    @cached_property
    def loss(self) -> ObjectiveConfig:
        """The objective with its options. Raises: UsageError for an unknown one."""
        share = ObjectiveChoice.cross_entropy if is_sum(self.objective) else 0.0  # a sum states its own
        return ObjectiveConfig.parse(self.objective, cross_entropy=share, temperature=1.0)

    @property
    def inputs(self) -> StageInputs:
        """Every model, cache and data set that a run reads."""
        frozen = [name for name in (self.reference, self.plus, self.minus) if name is not None]
        caches = [name for name in frozen if is_cache(Path(name).expanduser())]
        return StageInputs(
            models=(self.model, *(name for name in frozen if name not in caches)),
            data=(self.data, self.eval_data),
            folders=(self.reference_cache, *caches),
            origin=self.model,
        )
