"""The options of training Medusa heads."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from potstill.core.errors import UsageError
from potstill.core.options import ALLOW_PICKLE, DEVICE, DTYPE, TRUST_REMOTE_CODE
from potstill.stages.option_checks import check_save_dtype
from potstill.stages.options import COLUMNS, DATA, SAVE_DTYPE, TextOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.stage import to_plain_dict
from potstill.train.config import TrainConfig
from potstill.train.medusa import DECAY

NUM_HEADS = 3


@dataclass(frozen=True, kw_only=True)
class MedusaConfig(TextOptions):
    """Trains `num_heads` heads of `model` on `data`; the loss of the k-th has the weight `decay`^k.

    The heads are measured on the target's greedy answers, of at most `max_tokens` tokens, to `documents` held-out
    prompts; of a plain text the first tokens are the prompt. A run that was stopped can be resumed.

    Raises: UsageError for an option out of its range.
    """

    kind: ClassVar[str] = "medusa"

    model: str
    data: str | tuple[str, ...] = DATA.default
    columns: str = COLUMNS.default
    eval_data: str | None = None
    num_heads: int = NUM_HEADS
    decay: float = DECAY
    settings: TrainConfig = field(default_factory=TrainConfig)
    documents: int = 20
    max_tokens: int = 64
    device: str = DEVICE.default
    dtype: str = DTYPE.default
    save_dtype: str = SAVE_DTYPE.default
    allow_pickle: bool = ALLOW_PICKLE.default
    trust_remote_code: bool = TRUST_REMOTE_CODE.default

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in (("num_heads", 1), ("documents", 1), ("max_tokens", 2)):
            if getattr(self, name) < minimum:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        if not self.decay > 0:
            raise UsageError(f"decay is {self.decay}; it must be above 0, such as {DECAY}")
        for name in ("shard", "compile", "checkpoint_activations"):
            if getattr(self.settings, name):
                raise UsageError(f"{name} is for a student with layers, and the heads have none; omit it")
        check_save_dtype(self.save_dtype)

    def to_dict(self) -> dict[str, Any]:
        """The stage and its options as plain data."""
        return to_plain_dict(self)

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads."""
        return StageInputs(models=(self.model,), data=(self.data, self.eval_data))
