"""A loss that sends the tokens of old languages to the first expert, which knows them (LayerMoE)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.language import number_language, parse_languages
from potstill.core.types import Batch, Needs, Objective, Signals, Terms
from potstill.layers.ffn.experts import ROUTER_LOGITS
from potstill.objectives.cost import no_cost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.precision import upcast

LANGUAGES = "languages"  # of a batch: the number of each token's language (`core.language`)


@dataclass(frozen=True, kw_only=True)
class LanguageRouting:
    """-log p_0 at each token of an `old` language, the mean over layers: p is the router's, and expert 0 the original.

    Source: MoE-LPR (arXiv:2408.11396), the LPR loss, which LayerMoE (arXiv:2505.22582) takes over. Departs from the
    official code, which takes the log-softmax of probabilities instead of logits, and so of a softmax twice.

    Raises: UnsupportedModel in a call, if the student reports no router. UsageError, if the batch has no languages.
    """

    old: tuple[str, ...]
    name: str = "language_routing"
    additive: ClassVar[bool] = True

    @property
    def weights(self) -> Mapping[str, float]:
        """One term with weight 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The student's router at the tokens of old languages."""
        return {"student": Needs(self._find_old_tokens(batch), extras=frozenset({ROUTER_LOGITS}))}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The tokens of old languages."""
        return {self.name: int(self._find_old_tokens(batch).sum())}

    def __call__(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """The sum over the tokens of old languages."""
        if ROUTER_LOGITS not in views["student"].extras:
            raise UnsupportedModel(f"the student reports no router; the objective {self.name} needs experts")
        router_logits = views["student"].extras[ROUTER_LOGITS]
        log_p = upcast(router_logits).log_softmax(-1)[..., 0]
        return {self.name: -log_p.mean(1).sum()}

    def _find_old_tokens(self, batch: Batch) -> Bool[Tensor, "B T"]:
        if LANGUAGES not in batch:
            raise UsageError(f"the text has no languages, which {self.name} needs; this command does not read them")
        numbers = torch.tensor([number_language(name) for name in self.old], device=batch[LANGUAGES].device)
        return torch.isin(batch[LANGUAGES], numbers) & (batch["documents"] >= 0)


@register_objective(
    "language_routing",
    help="Old languages to the first expert (LayerMoE), as in language_routing:old=en/fr; no teacher.",
    cost=no_cost,
    uses_teacher=False,
    needs_teacher_model=False,
    supports_cross_tokenizer=True,
    text_options=("old", "column"),
    reads_language=True,
)
def build_language_routing(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """`LanguageRouting` of the languages that `old` names; `column` of the data names the language of a row."""
    return LanguageRouting(old=parse_languages(options.text_options.get("old", "")), name=options.name)
