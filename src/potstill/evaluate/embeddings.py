"""Embeddings of texts by a language model: the mean of its last hidden states over the tokens of each text."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.types import Needs
from potstill.evaluate.perplexity import get_bos_id
from potstill.evaluate.scoring_windows import Row, ScoringConfig, build_packs
from potstill.models.inference import get_max_context, inference_context
from potstill.models.signals import compute_signals

MAX_CONTEXT = 2048  # tokens of a text that are read


def embed_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    context: int = MAX_CONTEXT,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "N D"]:
    """The mean of the last hidden states, after the final norm, over the first `context` tokens of each text.

    A text without tokens has the embedding 0. Texts run in packs of several, none of which sees another.
    """
    context = min(context, get_max_context(model))
    bos = get_bos_id(tokenizer)
    prefix = [] if bos is None else [bos]
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    rows = [_make_row([*prefix, *ids][:context] if ids else []) for ids in encoded]
    packs = build_packs(rows, ScoringConfig(context=context), device=model.device)
    sums, counts = None, torch.zeros(len(texts), dtype=torch.float64)
    with inference_context(model, dtype=dtype):
        for pack in packs:
            everywhere = torch.ones_like(pack.batch["input_ids"], dtype=torch.bool)
            hidden = compute_signals(model, pack.batch, Needs(positions=everywhere)).rows.double().cpu()
            numbers = pack.row_indices[pack.batch["documents"][0].cpu()]
            sums = hidden.new_zeros(len(texts), hidden.shape[1]) if sums is None else sums
            sums.index_add_(0, numbers, hidden)
            counts += torch.bincount(numbers, minlength=len(texts))
    if sums is None:
        return torch.zeros(len(texts), 1, dtype=torch.float64)
    return sums / counts.clamp(min=1)[:, None]


def _make_row(ids: Sequence[int]) -> Row:
    return Row(ids, ids, 0)
