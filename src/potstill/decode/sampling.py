"""The distribution that a token is drawn from: temperature, filters and repetition penalty on the model's logits."""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from potstill.ops.categorical import sample_tokens as sample_tokens


@dataclass(frozen=True, kw_only=True)
class SamplingFilters:
    """Hugging Face's changes of a distribution before a token is drawn; by default there are none.

    `repetition_penalty` divides the positive logits of tokens that occur before, and multiplies the negative ones.
    After the temperature, `top_k` keeps the k likeliest tokens, `top_p` the likeliest that together have probability p,
    and `min_p` those at least p times as likely as the likeliest.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: only ids below `vocabulary`, at `temperature` (0 is greedy), until one of `stop` is drawn.

    Without `filters` the tokens follow the model's own distribution, as training and measuring need it.
    """

    vocabulary: int
    stop: frozenset[int]
    temperature: float = 1.0
    filters: SamplingFilters = field(default_factory=SamplingFilters)


def penalize_repetition(
    logits: Float[Tensor, "B V"], ids: Int[Tensor, "B S"], attention_mask: Bool[Tensor, "B S"], sampling: Sampling
) -> Float[Tensor, "B V"]:
    """The logits after the repetition penalty of the tokens in `ids`; padding, where the mask is False, is no token."""
    if sampling.filters.repetition_penalty == 1:
        return logits
    real_ids = ids.where(attention_mask, ids[:, -1:])  # the last token is always real
    penalized: Tensor = RepetitionPenaltyLogitsProcessor(sampling.filters.repetition_penalty)(real_ids, logits)
    return penalized


def token_probabilities(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """The distribution to draw from, in float64, because sums over a large vocabulary lose too much in float32.

    The largest logit is subtracted first, so that no temperature above 0 divides into infinity.
    """
    if sampling.temperature == 0:
        return one_hot(logits.argmax(-1), logits.shape[1]).double()
    scores = logits.double()
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
    filtered: Tensor = _make_warpers(sampling.filters)(None, scores)
    return filtered.softmax(-1)


def _make_warpers(filters: SamplingFilters) -> LogitsProcessorList:
    """The filters that act after the temperature, in the order of Hugging Face's `generate`."""
    warpers = LogitsProcessorList()
    if filters.top_k > 0:
        warpers.append(TopKLogitsWarper(filters.top_k))
    if filters.top_p < 1:
        warpers.append(TopPLogitsWarper(filters.top_p))
    if filters.min_p > 0:
        warpers.append(MinPLogitsWarper(filters.min_p))
    return warpers
