"""A model that decodes several texts at once: it reads tokens, gives logits, and takes drafts back.

Each text has a slot. `forward` reads new tokens of some slots in one pass, as a chain or as a tree; `commit` then keeps
a path of them. Plain decoding reads one token and commits it. `prefill` reads a prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from potstill.core.errors import UsageError
from potstill.decode.reader_choice import choose_reader
from potstill.models.edits import PlacedEdit, apply_edits, get_edits
from potstill.models.inference import get_max_context
from potstill.models.signals import probe_model, unwrap_model


class ForwardOutput(NamedTuple):
    """The logits after each new token, in float32, and the last hidden states if a known head makes the logits."""

    logits: Float[Tensor, "B T V"]
    hidden: Float[Tensor, "B T D"] | None


class PrefillOutput(NamedTuple):
    """The logits after a prompt, and the features of its tokens, from which `compute_logits` makes all logits."""

    logits: Float[Tensor, " V"]
    features: Float[Tensor, "T F"]


class ModelRunner:
    """`model` with `slots` texts of at most `context` tokens; its logits have `vocabulary` entries.

    It takes any Hugging Face causal language model, and runs it without gradients. The caller sets eval mode. With
    `quantize` the weights are int8 with a scale per row, which is another model (see `quantize_rows`). With `token_ids`
    it scores these tokens alone, and all others have the logit -inf.

    Raises: UsageError with `quantize` for a model that has no code for it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        vocabulary: int,
        slots: int = 1,
        context: int | None = None,
        quantize: bool = False,
        token_ids: Int[Tensor, " S"] | None = None,
    ) -> None:
        self.model, self.vocabulary, self.num_slots = unwrap_model(model), vocabulary, slots
        self.context = get_max_context(self.model) if context is None else context
        self.device = next(self.model.parameters()).device
        self.probe = probe_model(model)
        self.reader = choose_reader(self.model, self.probe, slots, vocabulary, quantize=quantize)
        self.edits = get_edits(self.model)
        self._placed_edits: dict[int, list[PlacedEdit]] = {}  # of the prompt in each slot
        if token_ids is not None:
            self.reader.restrict_vocabulary(token_ids)

    @property
    def takes_trees(self) -> bool:
        """Whether `forward` takes `parents`."""
        return self.reader.takes_trees

    @property
    def takes_drafts(self) -> bool:
        """Whether `commit` can drop new tokens."""
        return self.reader.takes_back()

    @property
    def chunk_size(self) -> int:
        """The tokens of a prompt that one pass reads."""
        return self.reader.chunk_size

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        """Announces the whole prompt that `prefill` will read into an empty slot, so that its edits act in it."""
        self._placed_edits[slot] = [] if self.edits is None else self.edits.find(prompt)

    @torch.no_grad()
    def prefill(self, slot: int, ids: Sequence[int]) -> PrefillOutput:
        """Reads a prompt behind the text of `slot` in chunks, and commits it.

        A long prompt may come in several calls. The edits of the model that `begin` has found act on it.
        """
        pieces: list[Tensor] = []
        for start in range(0, len(ids), self.chunk_size):
            chunk = list(ids[start : start + self.chunk_size])
            with self._edit(slot, len(chunk)):
                pieces.append(self._read([slot], torch.tensor([chunk], device=self.device), None)[0])
            self.reader.commit(slot, range(len(chunk)))
        return PrefillOutput(self.compute_logits(pieces[-1][-1:])[0], torch.cat(pieces))

    def forward(
        self,
        slots: Sequence[int],
        tokens: Int[Tensor, "B T"],
        parents: Int[Tensor, "B T"] | None = None,
    ) -> ForwardOutput:
        """Reads `tokens[b]` behind the text of `slots[b]`, all in one pass.

        `parents[b, t]` is the index of the token before t: smaller than t, or -1 for the text. Without `parents` each
        token follows the one before it. A row with fewer tokens ends in any tokens that are not committed. Until
        `commit`, another `forward` starts again from the text.

        Raises: UsageError if a text exceeds the context; UnsupportedModel for a tree that the model cannot read.
        """
        features = self._read(slots, tokens, parents)
        logits = self.compute_logits(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return ForwardOutput(logits, features if self.probe.has_head_on_hidden_states else None)

    @torch.no_grad()
    def commit(self, slot: int, positions: Sequence[int]) -> None:
        """Keeps the new tokens of `slot` with these indices, a path from the text, and drops the others."""
        self.reader.commit(slot, positions)

    def rewind(self, slot: int, length: int) -> int:
        """Keeps the first `length` tokens of `slot`, or none if the reader cannot; returns how many it keeps."""
        return self.reader.rewind(slot, length)

    @torch.no_grad()
    def copy(self, source: int, target: int) -> None:
        """Gives the slot `target` the committed text of `source`; what it held is forgotten."""
        self.reader.copy(source, target)

    def free(self, slot: int) -> None:
        """Forgets the text of a slot."""
        self._placed_edits.pop(slot, None)
        self.reader.free(slot)

    def get_length(self, slot: int) -> int:
        """The number of committed tokens of a slot."""
        return self.reader.get_length(slot)

    @torch.no_grad()
    def compute_logits(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N V"]:
        """The float32 logits of features: of last hidden states, or logits as they are without a known head."""
        return self.reader.compute_logits(features)

    @contextmanager
    def _edit(self, slot: int, width: int) -> Iterator[None]:
        """Inside, the edits at the next `width` tokens of a slot act."""
        start = self.get_length(slot)
        placed = self._placed_edits.get(slot, ())
        moved = [edit._replace(position=edit.position - start) for edit in placed]
        current = [edit for edit in moved if 0 <= edit.position < width]
        self.reader.runs_modules = bool(current)
        try:
            with apply_edits(self.model, [current]):
                yield
        finally:
            self.reader.runs_modules = False

    @torch.no_grad()
    def _read(self, slots: Sequence[int], tokens: Tensor, parents: Tensor | None) -> Tensor:
        longest = max(map(self.get_length, slots)) + (1 if parents is not None else tokens.shape[1])
        if longest > self.context:
            raise UsageError(f"a text of {longest} tokens exceeds the {self.context} tokens of context; shorten it")
        return self.reader.read(slots, tokens, parents)
