"""The options that choose the objective of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from potstill.core.options import Option

OBJECTIVE = Option(
    "forward_kl",
    "The loss to minimize: a divergence (forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, adaptive_kl; for "
    "drafts total_variation, acceptance_nll), with options after a colon (jsd:beta=0.3). Or a method of "
    "docs/objectives.md (dskd, uld, ...), cross_entropy (no teacher), a sum (0.6*cross_entropy+0.4*forward_kl), or "
    "your own FILE.py:FUNCTION.",
    name="objective",
)


@dataclass(frozen=True, kw_only=True)
class ObjectiveChoice:
    """The fields of `ObjectiveConfig`, with their defaults and help texts."""

    name: str = OBJECTIVE.field()
    cross_entropy: float = Option(
        0.7, "Weight of cross-entropy in the loss, 0 to 1; the objective has the rest."
    ).field()
    temperature: float = Option(
        1.0, "Divide the logits of both models by this, and multiply the divergence by its square."
    ).field()
    options: Mapping[str, float | str] = field(default_factory=dict)
