"""Runs a model in eval mode without gradients, and reads its context length."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from potstill.models.eval_mode import eval_mode
from potstill.models.signals import probe_model


def get_max_context(model: PreTrainedModel) -> int:
    """The context length in the model's config, in tokens; 2**31 if there is none, as for recurrent models."""
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(max_positions) if max_positions else 2**31


@contextmanager
def inference_context(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run the model in eval mode, without gradients and in `dtype`; afterwards each module has its former mode."""
    probe_model(model)  # before autocast, which would round the numbers that the probe compares
    use_autocast = dtype is not None and dtype != model.dtype
    with eval_mode(model), torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=use_autocast):
        yield
