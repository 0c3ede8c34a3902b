"""Experts for new languages, more of them where languages are less alike (LayerMoE, arXiv:2505.22582).

The first expert of a layer is the original feed-forward, and stays so with `--train 'router|experts\\.[1-9]'`. The
others are copies, and learn the new languages. A token computes two experts, whose weights sum to 1, so the function is
kept.

Departs from the official code: the router is drawn from N(0, 0.02^2), where theirs is Xavier normal. There is no
classifier that sends whole texts of old languages to the first expert, as in the official variant `no_cls`: it reads
the sum over a text, and so the future of each token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from potstill.core.blueprint import Blueprint
from potstill.core.errors import UsageError
from potstill.core.language import LANGUAGE_COLUMN, parse_languages
from potstill.core.options import SEED, Option
from potstill.core.types import Batch, Weights
from potstill.models.backbone import Backbone
from potstill.transforms.convert.conversion import Conversion, register_conversion
from potstill.transforms.convert.language_similarity import allocate_experts, compute_similarity, measure_directions
from potstill.transforms.convert.to_experts import ToExperts

EXPERTS_PER_LAYER = 2.5  # of the budget, as in the paper for Llama-3.2-3B: 70 for 28 layers


@register_conversion("layermoe", help="experts for new languages, more where languages are less alike (LayerMoE)")
@dataclass(frozen=True, kw_only=True)
class ToLayerMoE(Conversion):
    """Experts by the similarity of languages, measured on text whose rows name their language."""

    old: str = Option("", "Languages that the model knows, as the data names them, such as en or en/fr.").field()
    column: str = Option(LANGUAGE_COLUMN, "Column of the data that names the language of a row.").field()
    budget: int | None = Option[int | None](
        None, "Experts of all layers, the original ones included; by default 2.5 for each layer."
    ).field()
    top_k: int = Option(2, "Experts that a token computes.").field()
    seed: int = SEED.field()

    reads_text = True

    def __post_init__(self) -> None:
        parse_languages(self.old)
        if self.budget is not None and self.budget < 1:
            raise UsageError(f"layermoe: the budget is {self.budget}; it is a number of experts")

    @property
    def language_column(self) -> str:  # type: ignore[override]
        """The column that names the language of a row."""
        return self.column

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The layers with as many experts each as if languages were equally alike in all.

        Raises:
            UsageError: a layer has experts already, fewer neurons than experts, or a depth gate.
        """
        if any(layer.depth is not None for layer in old.layers):
            raise UsageError("layermoe measures every token in every layer; convert to layermoe first, then to depths")
        return self._allocate(old, [1.0] * len(old.layers)).blueprint(old)

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """The weights of those layers."""
        return self._allocate(old, [1.0] * len(old.layers)).weights(weights, old)

    def convert(self, model: Backbone, batches: Sequence[Batch]) -> tuple[Backbone, dict[str, Any]]:
        """The model with experts by similarity, and the similarity and the experts of each layer.

        Raises:
            DataError: an old language has no text, or no other language has any.
        """
        similarity = compute_similarity(measure_directions(model, batches), parse_languages(self.old)).tolist()
        upcycling = self._allocate(model.blueprint, similarity)
        converted, _ = upcycling.convert(model, [])
        counts = list(upcycling.list_counts(model.blueprint).values())
        return converted, {"language_similarity": similarity, "experts": counts}

    def _allocate(self, old: Blueprint, similarity: Sequence[float]) -> ToExperts:
        budget = EXPERTS_PER_LAYER * len(old.layers) if self.budget is None else self.budget
        counts = "-".join(map(str, allocate_experts(similarity, float(budget))))
        return ToExperts(counts=counts, top_k=self.top_k, weighting="normalized", separate=True, seed=self.seed)
