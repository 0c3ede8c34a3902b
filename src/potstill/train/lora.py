"""LoRA students through peft. Adapters are merged on export, so the published model is a stock one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.core.errors import ArtifactError, UsageError


def add_adapters(model: PreTrainedModel, rank: int, *, seed: int = 0) -> Any:
    """`model` with trainable LoRA adapters of `rank` on every linear layer except the head; all else is frozen.

    `seed` alone determines their initial weights.

    Source: arXiv:2106.09685, Eq. 3; alpha = 2 rank, as is common since.

    Raises: UsageError if the rank is below 1.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise UsageError(f"a LoRA rank of {rank} trains nothing; use 1 or more")
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merge_adapters(model: Any) -> PreTrainedModel:
    """The stock model, with the adapters added to its weights."""
    merged_model: PreTrainedModel = model.merge_and_unload()
    return merged_model


def get_adapter_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The adapters' parameters by name (not copies), or None for a model without adapters."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_adapter_weights(weights: Mapping[str, Tensor], saved_weights: Mapping[str, Tensor]) -> None:
    """Gives the adapters' parameters the values of a checkpoint.

    Raises: ArtifactError if the checkpoint has other adapters.
    """
    if weights.keys() != saved_weights.keys():
        raise ArtifactError(
            f"the checkpoint has other adapters than this run: {sorted(weights.keys() ^ saved_weights.keys())[0]}"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved_weights[name])


@contextmanager
def disable_adapters(model: Any) -> Iterator[None]:
    """Inside, a model with adapters computes what it would without them; nothing changes for any other model."""
    if get_adapter_weights(model) is None:
        yield
        return
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()
