"""How alike languages are inside a model, and how many experts each layer gets (LayerMoE, arXiv:2505.22582).

The similarity of two languages in a layer is the mean cosine of its feed-forward inputs. It is taken over all pairs of
a token of one and a token of the other. That is the product of their mean unit vectors, so no matrix of pairs is built.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from potstill.core.errors import DataError
from potstill.core.language import number_language
from potstill.core.types import Batch
from potstill.models.backbone import Backbone
from potstill.models.eval_mode import eval_mode
from potstill.models.hooks import temporary_hooks

MIN_SIMILARITY = 0.01
MIN_EXPERTS = 2  # of a layer: the original feed-forward, and one for the new languages


@torch.no_grad()
def measure_directions(model: Backbone, batches: Sequence[Batch]) -> dict[int, Float[Tensor, "L D"]]:
    """The mean unit vector of the inputs of each layer's feed-forward, for each language by its number."""
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    with eval_mode(model):
        for batch in batches:
            with _capture_inputs(model) as inputs:
                model(batch["input_ids"], batch["position_ids"])
            units = torch.stack([normalize(x.double(), dim=-1) for x in inputs])  # [L B T D]
            for number in batch["languages"].unique().tolist():
                tokens = batch["languages"] == number
                sums[number] = sums.get(number, 0) + units[:, tokens].sum(1)
                counts[number] = counts.get(number, 0) + int(tokens.sum())
    return {number: sums[number] / counts[number] for number in sums}


def compute_similarity(directions: Mapping[int, Float[Tensor, "L D"]], old: Sequence[str]) -> Float[Tensor, " L"]:
    """S of each layer: the mean over pairs of new languages and that over pairs of a new and an old one, averaged.

    All languages that `old` does not name are new. One new language alone has no pair, so only the second mean counts.

    Raises:
        DataError: an old language has no text, or no other language has any.
    """
    numbers = {number_language(name): name for name in old}
    if missing := sorted(set(numbers) - set(directions)):
        raise DataError(f"no calibration text is in {numbers[missing[0]]!r}; give --data with some, or other languages")
    new = sorted(set(directions) - set(numbers) - {-1})
    if not new:
        raise DataError(f"all calibration text is in {', '.join(old)}; give --data with text of new languages too")
    groups = [list(combinations(new, 2)), list(product(new, numbers))]
    cosines = [torch.stack([(directions[a] * directions[b]).sum(-1) for a, b in group]) for group in groups if group]
    return torch.stack([values.mean(0) for values in cosines]).mean(0)


def allocate_experts(similarity: Sequence[float], budget: float) -> tuple[int, ...]:
    """N_i = ceil(budget S_i^-1 / sum of S_j^-1), at least 2: layers where languages are less alike get more experts.

    N counts the original feed-forward. Roundings up make the sum larger than `budget`. A similarity below 0.01 counts
    as 0.01, so that no layer takes the whole budget.
    """
    inverse = [1 / max(value, MIN_SIMILARITY) for value in similarity]
    return tuple(max(MIN_EXPERTS, math.ceil(budget * value / sum(inverse))) for value in inverse)


@contextmanager
def _capture_inputs(model: Backbone) -> Iterator[list[Tensor]]:
    """The inputs of the feed-forwards in a forward pass inside the context, layer by layer."""
    inputs: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    with temporary_hooks([layer.get_submodule("ffn").register_forward_pre_hook(hook) for layer in model.layers]):
        yield inputs
