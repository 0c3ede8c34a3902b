"""Medusa heads as a network to train, and their loss.

    L = sum_k decay^k / N_k * sum_n -log softmax(W (h_n + SiLU(A_k h_n + b_k)))[x_(n+1+k)]        k = 1 ... K

h_n is the frozen target's last hidden state at position n, and W is its head. N_k counts the positions whose token
n+1+k is trained. The target runs once for all heads. No logits of all rows are in memory at once (`ops.fused`).

Source: Cai et al., "Medusa" (arXiv:2401.10774), equation 1, which leaves the target's own prediction (k = 0) out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.core.types import Batch, Needs, Signals, Terms, supervised_positions
from potstill.decode.drafters.medusa import MedusaHeads
from potstill.models.signals import compute_signals
from potstill.objectives.row_terms import get_head
from potstill.ops import fused
from potstill.ops.row_loss import CrossEntropyRows

DECAY = 0.8


class MedusaNetwork(nn.Module):
    """The heads on their target: the target's rows and head, and the states of the k-th head as the extra `head_k`.

    The target is outside the module tree, so it is neither trained nor saved.
    """

    def __init__(self, heads: MedusaHeads, target: PreTrainedModel) -> None:
        super().__init__()
        self.heads = heads
        self._targets = (target.eval(),)

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """The rows at the needed positions; gradients reach the heads alone."""
        with torch.no_grad():
            signals = compute_signals(self._targets[0].eval(), batch, Needs(needs.positions), vocabulary=vocabulary)
        states = self.heads(signals.rows)
        head = None if signals.head is None else signals.head.detach()
        return replace(signals, head=head, extras=dict(zip(list_head_names(len(states)), states, strict=True)))


@dataclass(frozen=True, kw_only=True)
class MedusaLoss:
    """The loss of `num_heads` heads, a term for each; the k-th has the weight `decay`^k."""

    num_heads: int
    decay: float = DECAY
    additive: ClassVar[bool] = True

    @property
    def weights(self) -> Mapping[str, float]:
        """decay^k by the name of the head."""
        return {name: self.decay**k for k, name in enumerate(list_head_names(self.num_heads), 1)}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows at all supervised positions, with the states of every head."""
        return {"student": Needs(supervised_positions(batch)[0], extras=frozenset(self.weights))}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of rows of each head."""
        return {name: int(shift_targets(batch, k)[0].sum()) for k, name in enumerate(self.weights, 1)}

    def __call__(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """The sums over rows. Raises: UnsupportedModel for a target without a readable head."""
        student, terms = views["student"], {}
        for k, name in enumerate(self.weights, 1):
            has_target, targets = shift_targets(batch, k)
            (terms[name],) = fused.sum_row_losses(
                [CrossEntropyRows()],
                student.extras[name][has_target],
                get_head(student, "target"),
                targets=targets,
                frozen={},
                mix=[1.0],
            )
        return terms


def list_head_names(num_heads: int) -> list[str]:
    """`head_1`, `head_2`, ...: terms of the loss, and extras of the network."""
    return [f"head_{k}" for k in range(1, num_heads + 1)]


def shift_targets(batch: Batch, shift: int) -> tuple[Bool[Tensor, " N"], Int[Tensor, " M"]]:
    """Which supervised rows have a trained token `shift` positions behind the next one, and that token for each.

    All tokens in between are trained too, and belong to the document of the row.
    """
    positions, targets, documents = supervised_positions(batch)
    num_pairs, places = max(0, len(targets) - shift), positions.flatten().nonzero()[:, 0]
    has_target = torch.zeros_like(targets, dtype=torch.bool)
    has_target[:num_pairs] = places[shift:] - places[:num_pairs] == shift
    has_target[:num_pairs] &= documents[shift:] == documents[:num_pairs]
    return has_target, targets[shift:][has_target[:num_pairs]]
