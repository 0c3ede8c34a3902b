"""Feed-forwards to experts: upcycling, where every expert starts as a copy of the trained feed-forward.

MiniMix (arXiv:2311.07052, the README of its code) has a pyramid, half as many experts in the bottom quarter of the
layers, and one active expert. Equal experts whose weights sum to 1 give the output of one, whatever the router says. So
the function is kept (arXiv:2212.05055 has the general idea):

    straight_through   the weights of the active experts sum to 1; the router gets a gradient from the first step
    normalized         the same sum; the router gets a gradient once experts differ, and none ever with one active
    softmax            the weights are probabilities, about 1 / experts, so the function changes (Switch)

The router is drawn from N(0, std^2). It breaks the symmetry of equal experts: each learns from other tokens. `noise`
does so too, and changes the function.
"""

import re
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer, weight_shapes
from potstill.core.errors import UsageError
from potstill.core.options import SEED, Option
from potstill.core.types import Weights
from potstill.layers.ffn.experts import Experts
from potstill.models.families.stacked_experts import SEPARATE_EXPERTS
from potstill.ops.routing import Weighting
from potstill.transforms.convert.conversion import Conversion, parse_layers, register_conversion

AUTO = "auto"
EXPERT_NAME = re.compile(r"\.ffn\.experts\.(\d+)\.")


@register_conversion("experts", help="several feed-forwards in place of one, of which each token computes a few")
@dataclass(frozen=True, kw_only=True)
class ToExperts(Conversion):
    """Copies feed-forwards into experts, behind fresh routers."""

    experts: int = Option(4, "Experts of a layer.").field()
    top_k: int = Option(1, "Experts that a token computes.").field()
    pyramid: bool = Option(True, "The bottom quarter of the layers has half as many experts.").field()
    counts: str | None = Option[str | None](
        None, "Experts of each converted layer, such as 2-2-4-4, instead of `experts` and `pyramid`."
    ).field()
    layers: str | None = Option[str | None](None, "Layers such as 0-3-5; by default all.").field()
    weighting: str = Option(
        AUTO, "straight_through, normalized or softmax; auto is normalized, and straight_through if top_k is 1."
    ).field()
    router_std: float = Option(0.02, "Standard deviation of the router's weights.").field()
    noise: float = Option(
        0.0, "Noise on all experts but the first, as a share of the standard deviation of each matrix."
    ).field()
    separate: bool = Option(
        False, "Store each expert by itself, so that --train can name some; stock families store them stacked."
    ).field()
    seed: int = SEED.field()

    def __post_init__(self) -> None:
        if self.weighting not in (AUTO, *get_args(Weighting)):
            names = ", ".join((AUTO, *get_args(Weighting)))
            raise UsageError(f"experts: there is no weighting {self.weighting!r}; choose one of {names}")
        if self.router_std <= 0:
            raise UsageError("experts: without a router of random weights equal experts stay equal; give router_std")
        if self.noise < 0:
            raise UsageError(f"experts: noise is {self.noise:g}; it is a share of at least 0")
        if self.experts < 2 or self.top_k < 1:
            raise UsageError("experts: a layer needs at least 2 experts, and a token at least 1 of them")

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same mixers, with experts in the chosen layers.

        Raises:
            UsageError: a layer has experts already, or fewer neurons than experts; there is no such layer; there are
            more or fewer counts than layers.
        """
        counts = self.list_counts(old)
        converted = (self._convert(layer, i, counts[i]) if i in counts else layer for i, layer in enumerate(old.layers))
        new = replace(old, layers=tuple(converted))
        return new.update_extras({SEPARATE_EXPERTS: True}) if self.separate else new

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """Copies of the feed-forwards, with noise if there is any, and routers."""
        generator = torch.Generator().manual_seed(self.seed)
        new: dict[str, Tensor] = {}
        for name, shape in weight_shapes(self.blueprint(old)).items():
            if name in weights:
                new[name] = weights[name]
            elif expert := EXPERT_NAME.search(name):
                new[name] = self._copy(weights[EXPERT_NAME.sub(".ffn.", name)], int(expert[1]), generator)
            else:
                router = torch.empty(shape).normal_(0.0, self.router_std, generator=generator)
                new[name] = router.to(weights["norm.weight"])
        return new

    def list_counts(self, old: Blueprint) -> dict[int, int]:
        """The number of experts of each converted layer.

        Raises:
            UsageError: there is no such layer, or there are more or fewer counts than layers.
        """
        count = len(old.layers)
        layers = parse_layers(self.layers, count)
        if self.counts is None:
            bottom = count // 4 if self.pyramid else 0
            return {i: max(1, self.experts // 2) if i < bottom else self.experts for i in layers}
        try:
            counts = [int(text) for text in self.counts.split("-")]
        except ValueError as error:
            raise UsageError(f"experts: counts={self.counts} is no list of numbers such as 2-2-4-4") from error
        if len(counts) != len(layers):
            raise UsageError(f"experts: there are {len(counts)} counts for {len(layers)} layers; give one for each")
        return dict(zip(layers, counts, strict=True))

    def _convert(self, layer: Layer, i: int, count: int) -> Layer:
        if layer.ffn.reports:
            raise UsageError(f"layer {i} has {layer.ffn.kind_name} already; name other layers with experts:layers=")
        if narrow := [cut.size for cut in layer.ffn.cuts().values() if cut.size < count]:
            raise UsageError(f"layer {i} has {narrow[0]} neurons, fewer than {count} experts; choose fewer experts")
        weighting = self.weighting
        if weighting == AUTO:
            weighting = "straight_through" if self.top_k == 1 else "normalized"
        return replace(layer, ffn=Experts(layer.ffn, count, min(self.top_k, count), weighting))

    def _copy(self, weight: Tensor, expert: int, generator: torch.Generator) -> Tensor:
        if expert == 0 or self.noise == 0 or weight.ndim < 2:
            return weight
        noise = torch.empty(weight.shape).normal_(generator=generator).to(weight)
        return weight + self.noise * weight.std() * noise
