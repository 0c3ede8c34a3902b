"""Language-agnostic factual neurons: the neurons of each layer that a fact activates in every language.

    s_l[i, n] = mean over paraphrases of |a_i[n]|       (language l, layer i, neuron n, at the subject's last token)
    D_l[i] = the neurons of the `top` largest s_l[i]
    LAFN[i] = intersection of D_l[i] over the languages

a is the activation of a gated feed-forward (`models/feed_forward.py`). Source: Zhang et al., "Multilingual Knowledge
Editing with Language-Agnostic Factual Neurons" (arXiv:2406.16416). No official code exists. The paper has the
intersection over languages and activations as the measure. The mean of magnitudes, `top` neurons of every layer, and
the fallback for an empty intersection are our reconstruction.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Neurons = Mapping[int, Int64[Tensor, " _"]]  # by layer, ascending


def score_neurons(activations: Float[Tensor, "B L F"]) -> Float[Tensor, "L F"]:
    """The mean magnitude of each neuron over B paraphrases; no unit."""
    return activations.abs().mean(0)


def find_shared_neurons(scores: Mapping[str, Float[Tensor, "L F"]], *, top: int) -> dict[int, Int64[Tensor, " _"]]:
    """The neurons of each layer that are among the `top` of every language.

    Where a layer has none, it gets the one neuron with the highest mean rank over the languages, which may be in no
    language's top.
    """
    common = torch.stack([select_top(language_scores, top) for language_scores in scores.values()]).all(0)
    ranks = torch.stack([_rank(language_scores) for language_scores in scores.values()]).sum(0)  # [L F]
    fallback = torch.zeros_like(common).scatter_(1, ranks.argmin(1, keepdim=True), value=True)
    chosen = torch.where(common.any(1, keepdim=True), common, fallback)
    return {layer: row.nonzero()[:, 0] for layer, row in enumerate(chosen)}


def list_fallback_layers(scores: Mapping[str, Float[Tensor, "L F"]], *, top: int) -> list[int]:
    """The layers in which no neuron is among the `top` of every language."""
    common = torch.stack([select_top(language_scores, top) for language_scores in scores.values()]).all(0)
    return torch.nonzero(~common.any(1))[:, 0].tolist()


def select_top(scores: Float[Tensor, "L F"], top: int) -> Bool[Tensor, "L F"]:
    """Whether a neuron is among the `top` of its layer; of equal ones the first."""
    return _rank(scores) < top


def choose_strongest(scores: Float[Tensor, "L F"], counts: Mapping[int, int]) -> dict[int, Int64[Tensor, " _"]]:
    """The neurons of one language: in each layer as many of the strongest as `counts` says."""
    ranks = _rank(scores)
    return {layer: (ranks[layer] < count).nonzero()[:, 0] for layer, count in counts.items()}


def choose_random(num_neurons: int, counts: Mapping[int, int], *, seed: int) -> dict[int, Int64[Tensor, " _"]]:
    """As many random neurons of each layer as `counts` says."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randperm(num_neurons, generator=generator)[:count].sort().values for layer, count in counts.items()
    }


def _rank(scores: Float[Tensor, "L F"]) -> Int64[Tensor, "L F"]:
    """The rank of each neuron in its layer: 0 is the strongest, and equal ones follow their order."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
