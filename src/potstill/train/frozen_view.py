"""A model in training as a frozen network: without its adapters, in eval mode and without gradients."""

from dataclasses import dataclass
from typing import Any

import torch

from potstill.core.types import Batch, Needs, Signals
from potstill.models.inference import inference_context
from potstill.models.signals import compute_signals, unwrap_model
from potstill.train.lora import disable_adapters


@dataclass(frozen=True)
class FrozenView:
    """The signals of `model` without its adapters: the reference of a LoRA student, without a second copy.

    Products are in `compute_dtype`, as in training. A model without adapters gives its present signals. Once adapters
    are merged, the view is no reference any more, since merging changes the weights below them.
    """

    model: Any
    compute_dtype: torch.dtype

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """The rows at the needed positions, and the head, which has no adapter."""
        inner = unwrap_model(self.model)
        with disable_adapters(self.model), inference_context(inner, dtype=self.compute_dtype):
            return compute_signals(inner, batch, needs, vocabulary=vocabulary)
