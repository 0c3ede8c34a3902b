"""Probes whether a network sees the tokens that it predicts, and refuses networks that do."""

import weakref

import torch
from torch import nn

from potstill.core.errors import UnsupportedModel
from potstill.core.types import Needs, SignalSource, move_batch
from potstill.models.dense_experts import dense_experts
from potstill.models.eval_mode import eval_mode
from potstill.models.probing import is_unmoved
from potstill.models.signals import compute_signals, probe_model

_task_causality: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def is_causal(network: nn.Module | SignalSource) -> bool:
    """Whether the rows of a network do not change when a later token changes.

    It assumes that a cache or a server is causal: potstill checked the cache's teacher, and servers serve language
    models.
    """
    if not isinstance(network, nn.Module):
        return True
    if not isinstance(network, SignalSource):
        return probe_model(network).is_causal
    if network not in _task_causality:
        _task_causality[network] = _is_task_model_causal(network)
    return _task_causality[network]


@torch.no_grad()
def _is_task_model_causal(network: nn.Module, *, length: int = 12) -> bool:
    """Whether changing the second half of some tokens does not change the rows of the first half."""
    embedding = next((module for module in network.modules() if isinstance(module, nn.Embedding)), None)
    if embedding is None:
        return True  # no tokens that could be changed
    generator = torch.Generator().manual_seed(0)
    ids, other_ids = torch.randint(3, embedding.num_embeddings, (2, 1, length), generator=generator)
    rows = []
    for probe_ids in (ids, torch.cat([ids[:, : length // 2], other_ids[:, length // 2 :]], 1)):
        columns = {
            "input_ids": probe_ids,
            "labels": probe_ids,
            "position_ids": torch.arange(length)[None],
            "documents": torch.zeros_like(probe_ids),
        }
        batch = move_batch(columns, embedding.weight.device)
        with eval_mode(network), dense_experts(network):
            rows.append(compute_signals(network, batch, Needs(torch.ones_like(batch["labels"], dtype=torch.bool))).rows)
    return is_unmoved(*(states[: length // 2] for states in rows))


def require_causal(network: nn.Module | SignalSource, name: str) -> None:
    """Refuse a network whose rows depend on later tokens, for an objective that predicts the next token.

    Raises: UnsupportedModel.
    """
    if not is_causal(network):
        raise UnsupportedModel(
            f"{name} is not causal: it sees the tokens that it would predict; choose a model that reads from left to "
            f"right (a causal language model), or train on targets at the position, such as masked words"
        )
