"""Compares what another runtime writes greedily with potstill's own logits in float32.

Both write the same tokens up to their first difference. So one forward pass over the runtime's text gives potstill's
choice at each of its positions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from potstill.models.inference import get_max_context

PROMPT = "What is a pot still?"
CHECK_LENGTH = 100  # tokens that are compared

Logits = NDArray[np.float32]  # [T V]


@dataclass(frozen=True)
class GreedyComparison:
    """The result of a comparison over `tokens` tokens.

    `first_difference` is the number of equal tokens before the first difference, None if all are equal. `logit_gap` is
    the largest difference of any logit before that, relative to the largest logit. `margin` is the difference of the
    two tokens' logits, relative in the same way. `passed`: the gap is the runtime's known rounding, and the margin at
    most twice the gap. Such a difference is a tie, since the rounding that was seen can change the order of the two.
    """

    runtime: str
    tokens: int
    logit_gap: float
    passed: bool
    first_difference: int | None = None
    margin: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and cards."""
        return asdict(self)

    def describe(self) -> str:
        """The result in one sentence."""
        gap = f"logits within {self.logit_gap:.1e} of the largest"
        if self.first_difference is None:
            return f"{self.tokens} greedy tokens equal, {gap}"
        kind = "a tie" if self.passed else "no tie"
        equal = f"{self.first_difference} of {self.tokens} greedy tokens equal"
        return f"{equal}, then {kind} (margin {self.margin:.1e}, {gap})"


def get_check_length(model: PreTrainedModel, ids: Sequence[int]) -> int:
    """How many tokens after `ids` are compared: 100, or what the context leaves."""
    return min(CHECK_LENGTH, get_max_context(model) - len(ids))


@torch.no_grad()
def compute_logits(model: PreTrainedModel, ids: Sequence[int], tokens: Sequence[int]) -> Logits:
    """The model's logits `[T V]` before each of `tokens`, which follow `ids`, in one forward pass."""
    rows = torch.tensor([[*ids, *tokens]], device=model.device)
    logits: Logits = model(input_ids=rows, use_cache=False).logits[0, len(ids) - 1 : -1].float().cpu().numpy()
    return logits


def compare_logits(
    runtime: str, tokens: Sequence[int], logits: Logits, reference: Logits, *, rounding: float
) -> GreedyComparison:
    """Compare the greedy tokens and logits `[T V]` of a runtime with our logits of the same text.

    `rounding` is the relative difference of logits that the runtime's arithmetic explains. Surplus columns are cut.
    """
    width, largest = min(logits.shape[1], reference.shape[1]), float(np.abs(reference).max())
    is_same = reference.argmax(-1) == np.array(tokens)
    first = None if is_same.all() else int(np.argmin(is_same))
    end = len(tokens) if first is None else max(first, 1)
    gap = float(np.abs(logits[:end, :width] - reference[:end, :width]).max()) / largest
    if first is None:
        return GreedyComparison(runtime, len(tokens), gap, gap <= rounding)
    margin = float(reference[first].max() - reference[first, tokens[first]]) / largest
    return GreedyComparison(runtime, len(tokens), gap, gap <= rounding and margin <= 2 * gap, first, margin)
