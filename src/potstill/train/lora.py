"""LoRA students through peft, merged on export so that what ships is a stock model."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.core.errors import UsageError


def add_adapters(model: PreTrainedModel, rank: int, *, seed: int = 0) -> Any:
    """`model` with trainable LoRA adapters of `rank` on every linear layer but the head, all else frozen.

    `seed` draws their first weights, whatever was drawn before.

    Source: arXiv:2106.09685, Eq. 3; alpha = 2 rank, as is common since.

    Raises: UsageError if the rank is below 1.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise UsageError(f"a LoRA rank of {rank} trains nothing; give 1 or more")
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merge_adapters(model: Any) -> PreTrainedModel:
    """The stock model with the adapters added into its weights."""
    merged_model: PreTrainedModel = model.merge_and_unload()
    return merged_model


def get_adapter_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The adapters' weights by name, live; None for a model that has none, all of which is trained."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
