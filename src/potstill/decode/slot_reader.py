"""Reads several texts in one pass, with a row of shared buffers for each."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.state import KeyValues, State
from potstill.decode.attention_mask import find_depths, make_attention_mask, make_distances
from potstill.decode.readers import ModelReader, compute_features, refuse_tree
from potstill.decode.slot_layers import RowRange
from potstill.decode.slots import SlotCache
from potstill.models.hf_causal_lm import PotstillForCausalLM
from potstill.models.signals import ModelProbe


class SlotReader(ModelReader):
    """Reads the new tokens of several texts in one pass, with their memory in a `SlotCache`.

    A text in use has a row of the buffers. The rows in use stay contiguous: when one becomes free, the last one moves
    into it. A pass over all texts therefore reads a view.
    """

    chunk_size = 256

    def __init__(self, model: PreTrainedModel, probe: ModelProbe, num_slots: int, vocabulary: int) -> None:
        super().__init__(model, probe, vocabulary)
        self.cache = SlotCache(_make_states(model), num_slots)
        self.slots: list[int] = []  # by row
        self.lengths: dict[int, int] = {}

    @property
    def takes_trees(self) -> bool:
        """Whether the memory of all layers is keys and values."""
        return self.cache.takes_trees

    def takes_back(self) -> bool:
        """True: new tokens count only once they are committed."""
        return True

    def read(
        self, slots: Sequence[int], tokens: Int[Tensor, "B T"], parents: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T F"]:
        """The features of the new tokens, each of which continues the text of its slot.

        Raises: UnsupportedModel for a tree, if the model has recurrences.
        """
        if parents is not None and not self.takes_trees:
            refuse_tree(self.model, parents)
            parents = None
        for slot in slots:
            if slot not in self.lengths:
                self.slots.append(slot)
                self.lengths[slot] = 0
        rows = [self.slots.index(slot) for slot in slots]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        if order == list(range(len(rows))):
            return self._read_rows(rows, tokens, parents)
        order_index = torch.tensor(order, device=tokens.device)
        ordered_parents = None if parents is None else parents[order_index]
        features = self._read_rows([rows[n] for n in order], tokens[order_index], ordered_parents)
        return features[order_index.argsort()]

    def commit(self, slot: int, positions: Sequence[int]) -> None:
        """Keeps a path of the new tokens."""
        self.cache.keep(self.slots.index(slot), self.lengths[slot], positions)
        self.lengths[slot] += len(positions)

    def rewind(self, slot: int, length: int) -> int:
        """Keeps the first `length` tokens of a slot; with recurrences it keeps all of them or none."""
        if length == 0 or (length < self.lengths[slot] and not self.takes_trees):
            self.free(slot)
            return 0
        self.lengths[slot] = length
        self.cache.clear(self.slots.index(slot), length)
        return length

    def copy(self, source: int, target: int) -> None:
        """Gives the slot `target` the committed text of `source`."""
        self.free(target)
        self.slots.append(target)
        self.lengths[target] = self.lengths[source]
        self.cache.copy(self.slots.index(source), len(self.slots) - 1, self.lengths[source])

    def free(self, slot: int) -> None:
        """Forgets the text of a slot; the last row moves into its row."""
        if self.lengths.pop(slot, None) is None:
            return
        row, last_slot = self.slots.index(slot), self.slots.pop()
        if last_slot != slot:
            self.slots[row] = last_slot
            self.cache.move(len(self.slots), row, self.lengths[last_slot])
            self.cache.clear(row, self.lengths[last_slot])
        self.cache.clear(len(self.slots))

    def get_length(self, slot: int) -> int:
        """The number of committed tokens of a slot."""
        return self.lengths.get(slot, 0)

    def _read_rows(self, rows: Sequence[int], tokens: Tensor, parents: Tensor | None) -> Tensor:
        lengths = [self.lengths[self.slots[row]] for row in rows]
        current, device = RowRange(rows, lengths, tokens.shape[1]), tokens.device
        self.cache.begin(current)
        length_column = torch.tensor(lengths, device=device)
        if parents is None:
            depths, ancestors = torch.arange(tokens.shape[1], device=device).expand(len(rows), -1), None
        else:
            depths, ancestors = find_depths(parents)
        positions = length_column[:, None] + depths
        distances = make_distances(length_column, depths, ancestors, current.span)
        mask = make_attention_mask(self.model.config, distances, positions, self.model.dtype)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        return compute_features(self.model, self.probe, {**inputs, "past_key_values": self.cache, "use_cache": True})[0]


def _make_states(model: PreTrainedModel) -> Sequence[State]:
    """An empty state of each layer; of a stock model keys and values, until a short example shows otherwise."""
    if isinstance(model, PotstillForCausalLM):
        return model.backbone.make_states()
    return [KeyValues()] * int(model.config.get_text_config().num_hidden_layers)
