"""Packed documents that do not see one another, in any Hugging Face model.

Stock SDPA isolates packed documents only with `position_ids`, no `attention_mask` and `use_cache=False`, and then by a
dense mask, quadratic in the length of the pack. `install` registers an attention function that runs causal attention
document by document instead, and a mask function that builds no mask. `isolates` is the probe: it compares two packed
documents with the same two alone.
"""

import weakref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from potstill.models.eval_mode import eval_mode
from potstill.ops.attention import Lengths, document_attention, document_lengths

ATTENTION_NAME = "potstill_documents"


class _LengthsCache:
    """The document boundaries of the last `position_ids`, so that they are found once a batch, not once a layer."""

    def __init__(self) -> None:
        self.key: tuple[weakref.ref[Tensor], int] | None = None
        self.value: Lengths = ()

    def get_lengths(self, position_ids: Tensor) -> Lengths:
        if self.key is None or self.key[0]() is not position_ids or self.key[1] != position_ids._version:
            self.key, self.value = (weakref.ref(position_ids), position_ids._version), document_lengths(position_ids)
        return self.value


_lengths_cache = _LengthsCache()


# what it reads (the lengths of documents) would be compiled in, anew with every batch
@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention `[B H T K] -> [B T H K]` inside each document of a pack; anything else goes to stock SDPA.

    The signature, `kwargs` included, is Hugging Face's attention interface. A batch counts as packed when it is one
    row without a mask and without cached keys.
    """
    is_packed = (
        attention_mask is None and position_ids is not None and len(query) == 1 and query.shape[2] == key.shape[2]
    )
    if not is_packed or position_ids is None or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = document_attention(
        query, key, value, _lengths_cache.get_lengths(position_ids), scale=scale, window=sliding_window
    )
    return output.transpose(1, 2).contiguous(), None


def packed_attention_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: object
) -> Tensor | None:
    """No mask for a packed row; SDPA's own mask as soon as there is padding or a cache."""
    if batch_size == 1 and attention_mask is None and q_length == kv_length and q_length > 1:
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs
    )
    return mask


AttentionInterface.register(ATTENTION_NAME, packed_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, packed_attention_mask)


def install_packed_attention(model: PreTrainedModel) -> bool:
    """Let `model` treat packed documents apart; True if it does afterwards, False if its batches must be padded.

    A model that fails the probe, or says something else about a single document than with its own attention (which may
    have sinks, or other terms that ours does not know), keeps the attention that it had.
    """
    original_attention, original_hidden = (
        model.config._attn_implementation,
        _compute_hidden_states(model, _make_documents(model)),
    )
    if original_hidden is not None and _set_attention(model, ATTENTION_NAME):
        document_hidden = _compute_hidden_states(model, _make_documents(model))
        if document_hidden is not None and _is_close(document_hidden, original_hidden) and is_packing_isolated(model):
            return True
    _set_attention(model, original_attention)
    return is_packing_isolated(model)


def is_packing_isolated(model: PreTrainedModel, *, seed: int = 0) -> bool:
    """Whether two packed documents give the hidden states that each gives alone (equal within the dtype's rounding)."""
    documents = _make_documents(model, seed=seed)
    separate_hidden, packed_hidden = (
        _compute_hidden_states(model, documents),
        _compute_hidden_states(model, documents, packed=True),
    )
    return separate_hidden is not None and packed_hidden is not None and _is_close(packed_hidden, separate_hidden)


def _make_documents(model: PreTrainedModel, *, seed: int = 0) -> list[Tensor]:
    """Two documents of random ids that this model can read."""
    generator, vocab_size = torch.Generator().manual_seed(seed), model.config.get_text_config().vocab_size
    return [torch.randint(3, vocab_size, (1, length), generator=generator).to(model.device) for length in (7, 12)]


@torch.no_grad()
def _compute_hidden_states(model: PreTrainedModel, documents: list[Tensor], *, packed: bool = False) -> Tensor | None:
    """The hidden states of the documents end to end, read one by one or as one pack; None if that cannot be asked."""
    position_ids = [torch.arange(ids.shape[1], device=ids.device)[None] for ids in documents]
    rows = (
        [(torch.cat(documents, 1), torch.cat(position_ids, 1))]
        if packed
        else list(zip(documents, position_ids, strict=True))
    )
    try:
        with eval_mode(model):
            outputs = (
                model.base_model(input_ids=ids, position_ids=positions, use_cache=False) for ids, positions in rows
            )
            return torch.cat([output.last_hidden_state for output in outputs], 1)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Equal within the dtype's rounding."""
    return bool((a - b).abs().max() <= 64 * torch.finfo(b.dtype).eps * b.abs().max())


def _set_attention(model: PreTrainedModel, name: str) -> bool:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, AttributeError):
        return False
    return bool(model.config._attn_implementation == name)
