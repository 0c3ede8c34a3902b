"""Experts that compute every token, for probes of what a token sees.

An expert computes its tokens in one product, and a product rounds by its number of rows. So a token moves by a few eps
when another one changes, even where it does not see it. If every expert computes all tokens, numbers of rows are equal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from potstill.layers.ffn.experts import RoutedExperts

IMPLEMENTATION_NAME = "potstill_dense"


@contextmanager
def dense_experts(model: nn.Module) -> Iterator[None]:
    """Inside, every expert of `model` computes all tokens, with weight 0 where it is not chosen; of any family."""
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    stock_layers = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
    configs: dict[int, Any] = {id(layer.config): layer.config for layer in stock_layers}
    names = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for layer in layers:
            layer.is_dense = True
        for config in configs.values():
            config._experts_implementation_internal = IMPLEMENTATION_NAME
        yield
    finally:
        for layer in layers:
            layer.is_dense = False
        for key, config in configs.items():
            config._experts_implementation_internal = names[key]


def compute_all_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The output of a stock module of experts, expert by expert, each on all tokens."""
    compute = type(module).forward.__wrapped__  # transformers wraps the plain form to choose among several
    weights = top_k_weights.new_zeros(len(hidden_states), module.num_experts).scatter(1, top_k_index, top_k_weights)
    outputs = [
        compute(module, hidden_states, torch.full_like(top_k_index[:, :1], expert), weights[:, expert, None])
        for expert in range(module.num_experts)
    ]
    return torch.stack(outputs).sum(0)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION_NAME, compute_all_experts)
