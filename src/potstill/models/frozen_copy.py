"""A frozen copy of a model in training, which computes what the model computes, bit by bit."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.models.inference import inference_context
from potstill.models.probing import PROBE_LENGTH, make_cache_options, make_probe_ids, make_probe_inputs
from potstill.models.signals import copy_probe, probe_model, unwrap_model


def copy_frozen(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A copy of a float32 model for forwards under autocast to `dtype`, in eval mode and without gradients.

    Weights that only products read are held in `dtype`, since autocast would round them so in every forward. That takes
    half the memory and no time for the cast. All other weights stay float32. Where the outputs of some tokens would
    differ in any bit, every weight stays float32.
    """
    probe_model(model)  # outside of autocast, and while all weights have one dtype
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    copy_probe(model, frozen)
    if dtype == frozen.dtype:
        return frozen
    logits = _compute_logits(frozen, dtype)
    weights = _cast_products(frozen, dtype)
    try:
        is_equal = torch.equal(_compute_logits(frozen, dtype), logits)
    except RuntimeError:  # a part of the model leaves autocast, and multiplies two dtypes
        is_equal = False
    if not is_equal:
        for parameter, values in weights:
            parameter.data = values
    return frozen


def _compute_logits(model: PreTrainedModel, dtype: torch.dtype) -> Tensor:
    inner = unwrap_model(model)
    ids = make_probe_ids(inner, length=PROBE_LENGTH, seed=0).to(next(inner.parameters()).device)
    with inference_context(inner, dtype=dtype):
        logits: Tensor = inner(**make_probe_inputs(inner, ids), **make_cache_options(inner)).logits
    return logits


def _cast_products(model: PreTrainedModel, dtype: torch.dtype) -> list[tuple[nn.Parameter, Tensor]]:
    """Cast the parameters of linear layers that no other module reads; gives them with their former values."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    other_modules = [module for module in model.modules() if type(module) is not nn.Linear]
    shared = {id(parameter) for module in other_modules for parameter in module.parameters(recurse=False)}
    weights = [(p, p.data) for layer in layers for p in layer.parameters() if id(p) not in shared]
    for parameter, values in weights:
        parameter.data = values.to(dtype)
    return weights
