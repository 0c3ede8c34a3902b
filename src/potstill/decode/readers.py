"""How a model reads the tokens of several texts and remembers them: in shared buffers, or each text by itself.

`SlotReader` (`slot_reader.py`) reads all texts in one pass. It serves models that accept a 4-D mask and whose memory is
keys and values, and potstill's own hybrids with recurrences. `RowReader` reads one text after another with the model's
own cache, or anew where there is none.
"""

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.state import commit as commit_cache
from potstill.core.state import record as record_cache
from potstill.core.types import Head
from potstill.decode.slot_layers import is_chain
from potstill.models.probing import make_probe_ids
from potstill.models.signals import ModelProbe, get_head

NO_CHUNKS = 2**31


@runtime_checkable
class Reader(Protocol):
    """Reads tokens behind those of a slot. New tokens count only once they are committed."""

    chunk_size: int  # tokens of a prompt that one pass may read
    runs_modules: bool  # whether a pass has to run the modules of the model, whose hooks act

    @property
    def takes_trees(self) -> bool:
        """Whether `read` takes trees and `commit` any path of them; else new tokens are chains."""
        ...

    def takes_back(self) -> bool:
        """Whether `commit` can drop new tokens."""
        ...

    def compute_logits(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N V"]:
        """The float32 logits of features."""
        ...

    def restrict_vocabulary(self, token_ids: Int[Tensor, " S"]) -> None:
        """Scores these tokens alone from now on; all others have the logit -inf."""
        ...

    def read(
        self, slots: Sequence[int], tokens: Int[Tensor, "B T"], parents: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T F"]:
        """The features of the new tokens: last hidden states, or logits where no known head makes them."""
        ...

    def commit(self, slot: int, positions: Sequence[int]) -> None:
        """Keeps these of the new tokens, a path, and drops the others."""
        ...

    def rewind(self, slot: int, length: int) -> int:
        """Keeps the first `length` tokens of a slot, or none where they cannot be kept; returns how many it keeps."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Gives the slot `target` the committed text of `source`."""
        ...

    def free(self, slot: int) -> None:
        """Forgets the text of a slot."""
        ...

    def get_length(self, slot: int) -> int:
        """The number of committed tokens of a slot."""
        ...


class ModelReader:
    """What every reader of a Hugging Face model has: the model, facts about it, and the size of its vocabulary."""

    def __init__(self, model: PreTrainedModel, probe: ModelProbe, vocabulary: int) -> None:
        self.model, self.probe, self.vocabulary = model, probe, vocabulary
        self.runs_modules = False
        self.token_ids: Int[Tensor, " S"] | None = None  # the only tokens to score
        self._head: Head | None = None  # of `token_ids`

    def compute_logits(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N V"]:
        """The float32 logits of last hidden states; without a known head, the features are logits already."""
        scores = self._score(features)
        if self.token_ids is None:
            return scores[:, : self.vocabulary]
        logits = scores.new_full((len(scores), self.vocabulary), -math.inf)
        return logits.index_copy_(1, self.token_ids, scores)

    def restrict_vocabulary(self, token_ids: Int[Tensor, " S"]) -> None:
        """Scores these tokens alone, with a copy of their rows of the head; all others have the logit -inf."""
        self.token_ids = token_ids.to(next(self.model.parameters()).device)
        if self.probe.has_head_on_hidden_states:
            self._head = get_head(self.model).select(self.token_ids).detach()

    def _score(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N S"]:
        """The float32 logits of `token_ids`, or of all tokens."""
        if not self.probe.has_head_on_hidden_states:
            return (features if self.token_ids is None else features[:, self.token_ids]).float()
        head = get_head(self.model).crop_vocabulary(self.vocabulary) if self._head is None else self._head
        return head.logits(features).float()


def compute_features(model: PreTrainedModel, probe: ModelProbe, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """(last hidden states or logits, the cache) of a pass; `position_ids` in `inputs` begin at 0."""
    if not probe.takes_position_ids:
        inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
    elif probe.position_offset:
        inputs = {**inputs, "position_ids": inputs["position_ids"] + probe.position_offset}
    if probe.has_head_on_hidden_states:
        outputs = model.base_model(**inputs)
        return outputs.last_hidden_state, _get_cache(outputs)
    outputs = model(**inputs)
    return outputs.logits, _get_cache(outputs)


def _get_cache(outputs: Any) -> Any:
    cache = getattr(outputs, "past_key_values", None)
    return getattr(outputs, "cache_params", None) if cache is None else cache


def refuse_tree(model: PreTrainedModel, parents: Int[Tensor, "B T"] | None) -> None:
    """Raises UnsupportedModel if the new tokens of a row are no chain."""
    if parents is not None and not bool((parents.cpu() == torch.arange(parents.shape[1]) - 1).all()):
        name = type(model).__name__
        raise UnsupportedModel(f"{name} keeps a state that one chain of tokens can continue, but no tree of drafts")


class RowReader(ModelReader):
    """Reads one text after another, each with a cache that the model makes; a model without a cache reads it anew.

    New tokens are chains. Taking some back needs a cache that `core.state.record` accepts; one token at a time needs
    no such cache.
    """

    chunk_size = NO_CHUNKS  # a stock recurrence reads a prompt in one pass only
    takes_trees = False

    def __init__(self, model: PreTrainedModel, probe: ModelProbe, vocabulary: int) -> None:
        super().__init__(model, probe, vocabulary)
        parameters = inspect.signature(model.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"  # Mamba's name
        self.ids: dict[int, Tensor] = {}
        self.new_ids: dict[int, Tensor] = {}
        self.caches: dict[int, Any] = {}

    def takes_back(self) -> bool:
        """Whether the model reads a text anew, or has a cache that `core.state.record` accepts."""
        ids = make_probe_ids(self.model, length=2, seed=0).to(next(self.model.parameters()).device)
        positions = torch.arange(2, device=ids.device)[None]
        with torch.no_grad():
            _, cache = compute_features(
                self.model, self.probe, {"input_ids": ids, "position_ids": positions, "use_cache": True}
            )
        try:
            record_cache(() if cache is None else cache)
        except UnsupportedModel:
            return False
        return True

    def read(
        self, slots: Sequence[int], tokens: Int[Tensor, "B T"], parents: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T F"]:
        """The features of the new tokens, text by text.

        Raises: UnsupportedModel for a tree, or for several tokens that the model's cache cannot take back.
        """
        refuse_tree(self.model, parents)
        return torch.cat([self._read_row(slot, row) for slot, row in zip(slots, tokens, strict=True)])

    def commit(self, slot: int, positions: Sequence[int]) -> None:
        """Keeps the first of the new tokens; `positions` are 0, 1, ... ."""
        assert is_chain(positions), "a chain keeps the first of its tokens"
        all_new_ids, cache = self.new_ids.pop(slot), self.caches.get(slot)
        new_ids = all_new_ids[: len(positions)]
        self.ids[slot] = torch.cat([self.ids[slot], new_ids])
        if cache is not None and len(new_ids) < len(all_new_ids):
            commit_cache(cache, len(self.ids[slot]))

    def rewind(self, slot: int, length: int) -> int:
        """Keeps nothing, because a recurrence or a sliding window may not go back."""
        self.free(slot)
        return 0

    def copy(self, source: int, target: int) -> None:
        """Gives the slot `target` the committed text of `source`, with a cache of its own."""
        self.free(target)
        self.ids[target] = self.ids[source]
        if source in self.caches:
            self.caches[target] = copy.deepcopy(self.caches[source])

    def free(self, slot: int) -> None:
        """Forgets the text of a slot."""
        for memory in (self.ids, self.new_ids, self.caches):
            memory.pop(slot, None)

    def get_length(self, slot: int) -> int:
        """The number of committed tokens of a slot."""
        return len(self.ids.get(slot, ()))

    def _read_row(self, slot: int, tokens: Int[Tensor, " T"]) -> Float[Tensor, "1 T F"]:
        ids = self.ids.setdefault(slot, tokens[:0])
        if slot in self.new_ids:
            self._drop_new_tokens(slot)
        self.new_ids[slot] = tokens
        cache = self.caches.get(slot)
        if cache is not None and len(tokens) > 1:
            record_cache(cache)
        inputs = torch.cat([ids, tokens]) if cache is None else tokens
        start = 0 if cache is None else len(ids)
        positions = torch.arange(start, start + len(inputs), device=tokens.device)[None]
        features, new_cache = compute_features(
            self.model,
            self.probe,
            {"input_ids": inputs[None], "position_ids": positions, self.cache_name: cache, "use_cache": True},
        )
        if new_cache is not None:
            self.caches[slot] = new_cache
        return features[:, -len(tokens) :]

    def _drop_new_tokens(self, slot: int) -> None:
        """Takes back tokens that were not committed; a cache that cannot is dropped, and the text is read anew."""
        try:
            commit_cache(self.caches.get(slot, ()), len(self.ids[slot]))
        except (UnsupportedModel, UsageError):
            del self.caches[slot]
