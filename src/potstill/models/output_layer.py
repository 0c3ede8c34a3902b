"""The output layer of any kind of model, and its input rows.

The rows of a decoder are its last hidden states. A masked language model (BERT, RoBERTa) first transforms them, T5 may
scale them, a classifier may pool them. For those models a hook reads the rows at the output layer in a forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel
from potstill.core.types import Head
from potstill.models.eval_mode import eval_mode
from potstill.models.probing import make_cache_options, make_probe_ids, make_probe_inputs


def find_output_layer(model: PreTrainedModel) -> Any:
    """The module that makes the logits: the output embeddings, else the last linear layer after the base model.

    None if there is neither.
    """
    output_embeddings = model.get_output_embeddings()
    if output_embeddings is not None:
        return output_embeddings
    inside_base = set(model.base_model.modules())
    linear_layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return next((module for module in reversed(linear_layers) if module not in inside_base), None)


def read_head(model: PreTrainedModel) -> Head:
    """The output layer with the scale and soft-cap that the family applies to its logits.

    Raises: UnsupportedModel if the model has no output layer.
    """
    output_layer, config = find_output_layer(model), model.config.get_text_config()
    if output_layer is None:
        raise UnsupportedModel(f"{type(model).__name__} has no output layer; load it with a language-model head")
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return Head(output_layer.weight, getattr(output_layer, "bias", None), float(scale), softcap)


@contextmanager
def capture_output_rows(model: PreTrainedModel, *, skip_logits: bool) -> Iterator[list[Tensor]]:
    """Inside, a forward appends the input of the output layer: `[B T F]`, or `[B F]` if the model pools.

    With `skip_logits` the layer gets no rows, so that it computes no logits.
    """
    rows: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows.append(args[0])
        return (args[0][..., :0, :], *args[1:]) if skip_logits else args

    output_layer = find_output_layer(model)
    handle = None if output_layer is None else output_layer.register_forward_pre_hook(hook)
    try:
        yield rows
    finally:
        if handle is not None:
            handle.remove()


def select_rows(states: Tensor, positions: Tensor) -> Tensor:
    """`states [B T F]` at the positions `[B T]`; with pooled `states [B F]` the row of each position's document."""
    return states[positions] if states.ndim == positions.ndim + 1 else states[positions.nonzero()[:, 0]]


@torch.no_grad()
def find_output_rows(model: PreTrainedModel, head: Head, *, seed: int = 0) -> Float[Tensor, "B *T F"] | None:
    """The input of the output layer on random tokens; None if `head` does not make the model's logits from it."""
    ids = make_probe_ids(model, length=8, seed=seed).to(next(model.parameters()).device)
    with eval_mode(model), capture_output_rows(model, skip_logits=False) as captured_rows:
        output = model(**make_probe_inputs(model, ids), **make_cache_options(model))
    if len(captured_rows) != 1 or getattr(output, "logits", None) is None:
        return None
    rows, logits = captured_rows[0], output.logits
    head_logits = head.logits(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])
    if logits.ndim < head_logits.ndim:  # a decoder that classifies a text pools its logits, here of the last token
        logits, head_logits = logits[:, None], head_logits[:, -1:]
    return rows if is_same_logits(logits, head_logits) else None


def is_same_logits(logits: Tensor, head_logits: Tensor) -> bool:
    """Equal shapes, and equal values within 16 eps of the largest logit."""
    tolerance = 16 * torch.finfo(head_logits.dtype).eps * logits.float().abs().max().clamp(min=1)
    return logits.shape == head_logits.shape and bool((logits.float() - head_logits.float()).abs().max() <= tolerance)
