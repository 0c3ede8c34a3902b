"""Output heads, which map the last hidden states to logits; a call returns the `Head`, for fused kernels."""

import torch
from torch import nn

from potstill.core.types import Head


class LanguageHead(nn.Module):
    """A head with its own weights, `[V D]`."""

    def __init__(self, vocabulary: int, hidden: int, *, softcap: float | None = None) -> None:
        super().__init__()
        self.softcap = softcap
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self) -> Head:
        """The weights and the soft-cap of the logits."""
        return Head(self.weight, softcap=self.softcap)


class TiedHead(nn.Module):
    """The embedding as head: it stores no weight, so there is one table to train, prune and save."""

    def __init__(self, embed: nn.Embedding, *, softcap: float | None = None) -> None:
        super().__init__()
        self.softcap = softcap
        self._embed = (embed,)  # inside a tuple it is no submodule, so its weight is listed once

    def forward(self) -> Head:
        """The present weights of the embedding."""
        return Head(self._embed[0].weight, softcap=self.softcap)
