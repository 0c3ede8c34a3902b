"""Isolates packed documents in any Hugging Face model.

Stock SDPA isolates packed documents only with `position_ids`, no `attention_mask` and `use_cache=False`, and then by a
dense mask, quadratic in the length of the pack. `install_packed_attention` sets an attention function that runs causal
attention document by document, and a mask function that builds no mask. `is_packing_isolated` probes the result.

A continuation (`core.types`) also sees its prompt. Stock masks drop the prompt without an error, so only networks with
this attention may share prompts; `is_prompt_shared` probes them.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from potstill.models.dense_experts import dense_experts
from potstill.models.probing import compute_hidden_states, is_close, is_unmoved, make_probe_ids, sees_no_later_token
from potstill.ops.attention import (
    Lengths,
    Prefixes,
    document_attention,
    document_lengths,
    document_prefixes,
)

ATTENTION_NAME = "potstill_documents"


class _DocumentsCache:
    """Lengths and prefixes in the last `position_ids`, computed once per batch instead of once per layer."""

    def __init__(self) -> None:
        self.key: tuple[weakref.ref[Tensor], int] | None = None
        self.lengths: Lengths = ()
        self.prefixes: Prefixes | None = None

    def find(self, position_ids: Tensor) -> tuple[Lengths, Prefixes | None]:
        if self.key is None or self.key[0]() is not position_ids or self.key[1] != position_ids._version:
            ids = position_ids.cpu()
            self.key, self.lengths = (weakref.ref(position_ids), position_ids._version), document_lengths(ids)
            self.prefixes = document_prefixes(ids, self.lengths)
        return self.lengths, self.prefixes


_documents_cache = _DocumentsCache()


# The lengths of documents would be compiled in, which compiles again with every batch.
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
    """Attention `[B H T K] -> [B T H K]` inside the documents of a pack and to their prompts; else stock SDPA.

    The signature, `kwargs` included, is Hugging Face's attention interface: `dropout` is the config's attention dropout
    in training and 0 in eval mode. A batch counts as packed when it is one row without a mask and without cached keys.
    """
    is_packed = (
        attention_mask is None and position_ids is not None and len(query) == 1 and query.shape[2] == key.shape[2]
    )
    if not is_packed or position_ids is None or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths, prefixes = _documents_cache.find(position_ids)
    output = document_attention(
        query,
        key,
        value,
        lengths,
        scale=scale,
        window=sliding_window,
        dropout=dropout,
        prefixes=prefixes,
    )
    return output.transpose(1, 2).contiguous(), None


def packed_attention_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: object
) -> Tensor | None:
    """No mask for a packed row; SDPA's own mask if there is padding or a cache."""
    if batch_size == 1 and attention_mask is None and q_length == kv_length and q_length > 1:
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs
    )
    return mask


AttentionInterface.register(ATTENTION_NAME, packed_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, packed_attention_mask)


def install_packed_attention(model: PreTrainedModel, *, position_offset: int = 0) -> bool:
    """Isolate packed documents in `model`; True if that works, False if its batches must be padded.

    A model keeps its own attention if packed attention mixes documents, or changes the hidden states of a single
    document. Such an attention may see later tokens, or have sinks or other terms that packed attention lacks.
    `position_offset` is the first position of a document.
    """
    if not sees_no_later_token(model):
        return is_packing_isolated(model, position_offset=position_offset)
    probe = _PackingProbe(model, position_offset)
    own_attention, own_hidden = model.config._attn_implementation, probe.compute_separate()
    if own_hidden is not None and _set_attention(model, ATTENTION_NAME):
        packed_hidden = probe.compute_separate()
        is_equal = packed_hidden is not None and is_close(packed_hidden, own_hidden)
        if is_equal and probe.is_isolated(packed_hidden):
            return True
    _set_attention(model, own_attention)
    return is_packing_isolated(model, position_offset=position_offset)


def is_packing_isolated(model: PreTrainedModel, *, position_offset: int = 0, seed: int = 0) -> bool:
    """Whether packing does not change the hidden states of documents.

    Two packed documents must have the same hidden states as alone, within the dtype's rounding. When one document
    changes, no hidden state of the other may move by more than 2 eps, relative to the largest.
    """
    probe = _PackingProbe(model, position_offset, seed)
    return probe.is_isolated(probe.compute_separate())


def is_packed_attention(model: PreTrainedModel) -> bool:
    """Whether packed attention is installed: no token sees a later one, or another document."""
    return bool(model.config._attn_implementation == ATTENTION_NAME)


def is_prompt_shared(model: PreTrainedModel, *, position_offset: int = 0, seed: int = 0) -> bool:
    """Whether continuations see their prompt: its tokens before their own, and nothing of one another.

    The network must have packed attention, since every other one drops the prompt. A pack of a prompt and two
    continuations must have the hidden states of two whole documents, within the dtype's rounding. When the first
    continuation changes, no other hidden state may move by more than 2 eps, relative to the largest.
    """
    if not is_packed_attention(model):
        return False
    prompt, first, other, second = (
        make_probe_ids(model, length=length, seed=seed + number).to(model.device)
        for number, length in enumerate((6, 5, 5, 9))
    )
    start = prompt.shape[1]
    positions = torch.arange(start + second.shape[1], device=prompt.device)[None] + position_offset
    first_end = start + first.shape[1]
    pack_positions = torch.cat([positions[:, :first_end], positions[:, start:]], 1)
    wholes = [torch.cat([prompt, first], 1), torch.cat([prompt, second], 1)]
    separate = _compute_hidden_states(model, [(ids, positions[:, : ids.shape[1]]) for ids in wholes])
    packed, changed = (
        _compute_hidden_states(model, [(torch.cat([prompt, answer, second], 1), pack_positions)])
        for answer in (first, other)
    )
    if separate is None or packed is None or changed is None:
        return False
    separate = torch.cat([separate[:, :first_end], separate[:, first_end + start :]], 1)
    unchanged = torch.tensor([*range(start), *range(first_end, packed.shape[1])], device=packed.device)
    return is_close(packed, separate) and is_unmoved(packed[:, unchanged], changed[:, unchanged])


class _PackingProbe:
    """Two documents of random ids, and their hidden states one by one or packed; None if the model refuses them."""

    def __init__(self, model: PreTrainedModel, position_offset: int, seed: int = 0) -> None:
        self.model = model
        self.documents, self.other_documents = (
            [make_probe_ids(model, length=length, seed=number).to(model.device) for length in (7, 12)]
            for number in (seed, seed + 1)
        )
        self.position_ids = [
            torch.arange(ids.shape[1], device=ids.device)[None] + position_offset for ids in self.documents
        ]

    def compute_separate(self) -> Tensor | None:
        """The hidden states of the documents, each computed alone, end to end."""
        return _compute_hidden_states(self.model, zip(self.documents, self.position_ids, strict=True))

    def compute_packed(self, changed: int | None = None) -> Tensor | None:
        """The hidden states of one pack; document `changed` has other tokens."""
        documents = [
            other if number == changed else ids
            for number, (ids, other) in enumerate(zip(self.documents, self.other_documents, strict=True))
        ]
        return _compute_hidden_states(self.model, [(torch.cat(documents, 1), torch.cat(self.position_ids, 1))])

    def is_isolated(self, separate: Tensor | None) -> bool:
        """Whether a pack has the hidden states `separate`, and keeps those of one document when the other changes."""
        packed = self.compute_packed()
        if separate is None or packed is None or not is_close(packed, separate):
            return False
        first_length = self.documents[0].shape[1]
        for changed, unchanged in ((0, slice(first_length, None)), (1, slice(first_length))):
            after = self.compute_packed(changed)
            if after is None or not is_unmoved(packed[:, unchanged], after[:, unchanged]):
                return False
        return True


def _compute_hidden_states(model: PreTrainedModel, rows: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The hidden states of rows of ids and positions, end to end; None if the model refuses a row."""
    try:
        with dense_experts(model):
            return torch.cat([compute_hidden_states(model, ids, positions) for ids, positions in rows], 1)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def _set_attention(model: PreTrainedModel, name: str) -> bool:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, AttributeError):
        return False
    return bool(model.config._attn_implementation == name)
