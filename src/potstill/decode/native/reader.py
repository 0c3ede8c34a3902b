"""Reads tokens with `decoder.c`: rows, keys and values as in `SlotReader`, one call of C per pass."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from potstill.decode.attention_mask import find_depths
from potstill.decode.native.library import Pass, load_library
from potstill.decode.native.network import NativeNetwork, read_network
from potstill.decode.slot_layers import RowRange
from potstill.decode.slot_reader import SlotReader
from potstill.models.signals import ModelProbe, get_head


class NativeReader(SlotReader):
    """A `SlotReader` on the CPU, with float32 activations, keys and values.

    A pass that has to run the model's modules does, and writes the same keys and values.
    The bits of a token's logits depend neither on the other tokens of the pass nor on the number of threads. With
    `quantize` every matrix is int8 with a scale per row.

    Raises: UnsupportedModel for a network that `decoder.c` does not express, or without a compiler.
    """

    chunk_size = 64

    def __init__(
        self, model: PreTrainedModel, probe: ModelProbe, num_slots: int, vocabulary: int, *, quantize: bool = False
    ) -> None:
        super().__init__(model, probe, num_slots, vocabulary)
        self.library: Any = load_library()
        self.native = NativeNetwork(*read_network(model), quantize=quantize)
        for layer, mixer in zip(self.cache.layers, self.native.attentions, strict=True):
            fake_states = torch.empty(0, mixer.kv_heads, 0, mixer.head_dim)
            layer.lazy_initialization(fake_states, fake_states)
        self._capacity = 0
        self._scratch = torch.empty(0)

    def restrict_vocabulary(self, token_ids: Int[Tensor, " S"]) -> None:
        """Scores these tokens alone, with a copy of their rows of the head; all others have the logit -inf."""
        self.token_ids = token_ids
        head = get_head(self.model).select(token_ids).detach()
        self.native.head = self.native.make_matrix(head.weight, head.bias)

    def _score(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N S"]:
        """The logits of last hidden states, with float32 sums."""
        rows = features.float().contiguous()
        logits = torch.empty(len(rows), self.native.head.rows)
        self.library.potstill_multiply(
            ctypes.byref(self.native.head), rows.data_ptr(), logits.data_ptr(), len(rows), torch.get_num_threads()
        )
        softcap = self.native.blueprint.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _read_rows(
        self, rows: Sequence[int], tokens: Int[Tensor, "B T"], parents: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T F"]:
        if self.runs_modules:
            return super()._read_rows(rows, tokens, parents)
        lengths = [self.lengths[self.slots[row]] for row in rows]
        (batch, width), blueprint = tokens.shape, self.native.blueprint
        current = RowRange(rows, lengths, width)
        self.cache.begin(current)
        if self._capacity != self.cache.layout.capacity:
            self._capacity = self.cache.layout.capacity
            self.native.set_buffers([(layer.keys, layer.values) for layer in self.cache.layers], self._capacity)
        depths, tree = torch.arange(width).expand(batch, -1), None
        if parents is not None:
            depths, ancestors = find_depths(parents)
            tree = ancestors.to(torch.uint8).contiguous()
        numbers = torch.tensor([rows, lengths, [width * n for n in range(batch)], [width] * batch])
        positions = (numbers[1][:, None] + depths).contiguous()
        x = self.native.embedding[tokens.flatten()].float()
        if blueprint.embedding_scale != 1:
            x *= self.native.embedding.new_full((), blueprint.embedding_scale).float()
        self._run(current, numbers, positions, tree, x)
        return x.view(batch, width, -1)

    def _run(self, current: RowRange, numbers: Tensor, positions: Tensor, tree: Tensor | None, x: Tensor) -> None:
        """One call of `potstill_decode`, which replaces the embeddings `x` by last hidden states."""
        num_tokens, hidden = x.shape
        threads, (query_width, key_width, neurons) = torch.get_num_threads(), self.native.max_widths
        scratch_size = 2 * num_tokens * hidden + max(hidden, 2 * (current.span + 8))
        sizes = [num_tokens * n for n in (query_width, key_width, key_width, query_width, 2 * neurons, hidden)]
        total = sum(sizes) + threads * scratch_size
        if len(self._scratch) < total:
            self._scratch = torch.empty(total)
        pointers = [self._scratch.data_ptr()]
        for size in sizes:
            pointers.append(pointers[-1] + 4 * size)
        step = numbers.stride(0) * 8
        first = numbers.data_ptr()
        self.native.network.threads = threads
        self.library.potstill_decode(
            ctypes.byref(self.native.network),
            ctypes.byref(
                Pass(
                    *(first + step * n for n in range(4)),
                    positions.data_ptr(),
                    None if tree is None else tree.data_ptr(),
                    len(current.rows),
                    num_tokens,
                    current.width,
                    x.data_ptr(),
                    *pointers,
                    scratch_size,
                    current.span,
                )
            ),
        )
