"""What an objective with weights or tables of its own has to know of the two networks before training."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import VocabularyMismatch
from potstill.core.types import Head
from potstill.models.nearest import nearest
from potstill.models.pieces import Pieces, counterparts, pieces
from potstill.models.signals import head_of, plain, projections
from potstill.models.vocabulary import real_ids, shared_ids

AT_ONCE = 2**13  # embeddings looked at together


@dataclass(frozen=True, eq=False)
class Side:
    """One network with its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def ids(self) -> int:
        """How many ids stand for a token."""
        return real_ids(self.tokenizer)

    @property
    def head(self) -> Head:
        """The output layer, cut to the real ids."""
        return head_of(self.model).real(self.ids)

    @property
    def width(self) -> int:
        """Of the last hidden states."""
        return self.head.weight.shape[1]

    @property
    def depth(self) -> int:
        """How many layers it has."""
        layers: int = plain(self.model).config.get_text_config().num_hidden_layers
        return layers

    @property
    def relations(self) -> dict[str, int]:
        """The widths of the queries, keys and values of its last attention layer.

        Raises: UnsupportedModel where it has none apart.
        """
        return {name: module.get_parameter("weight").shape[0] for name, module in projections(self.model).items()}

    @cached_property
    def pieces(self) -> Pieces:
        """What its ids stand for."""
        return pieces(self.tokenizer)

    @torch.no_grad()
    def spread(self) -> float:
        """The standard deviation of its input embeddings, over all entries of all real ids."""
        embed = plain(self.model).get_input_embeddings()
        device = next(embed.parameters()).device
        parts = [embed(ids).double() for ids in torch.arange(self.ids, device=device).split(AT_ONCE)]
        return float(torch.cat([part.flatten() for part in parts]).std())


@dataclass(frozen=True, eq=False)
class Sides:
    """Student and teacher; `ends` are the ids that end an answer of each, where it is not their end of text."""

    student: Side
    teacher: Side
    ends: tuple[int, int] | None = None

    @cached_property
    def shared(self) -> int | None:
        """How many ids both read as the same tokens; None where their tokenizers differ."""
        try:
            return shared_ids(self.teacher.tokenizer, self.student.tokenizer)
        except VocabularyMismatch:
            return None

    @property
    def scale(self) -> float:
        """By how much more the teacher's head scales its logits than the student's."""
        return self.teacher.head.scale / self.student.head.scale

    @property
    def vocabularies(self) -> tuple[int, int]:
        """How many ids of the student and of the teacher are compared."""
        return (self.student.ids, self.teacher.ids) if self.shared is None else (self.shared, self.shared)

    @cached_property
    def nearest(self) -> Int[Tensor, " V_t"]:
        """For each of the teacher's ids the student's that is written most like it, -1 where none is."""
        if self.shared is not None:
            return torch.arange(self.shared)
        found = nearest(self.teacher.pieces, self.student.pieces)
        if self._ends:
            found[self._ends[0][0]] = self._ends[0][1]
        raw = torch.tensor(sorted(self.teacher.pieces.raw), dtype=torch.long)
        written = found.clone()
        written[raw] = -1
        found[raw[torch.isin(found[raw], written)]] = -1  # a byte fallback is written only where nothing else is
        return found

    @cached_property
    def same_strings(self) -> Int[Tensor, "2 S"]:
        """The ids of the student and of the teacher that stand for the same bytes, or both end a text; each id once.

        Of several ids of a side the one that is no byte fallback, then the lowest, as a tokenizer itself writes it.
        """
        if self.shared is not None:
            return torch.arange(self.shared).expand(2, -1)
        ours = counterparts(self.teacher.pieces, self.student.pieces, also=self._ends)
        theirs = counterparts(self.student.pieces, self.teacher.pieces, also=[(b, a) for a, b in self._ends])
        both = ((theirs >= 0) & (ours[theirs] == torch.arange(len(theirs)))).nonzero()[:, 0]
        return torch.stack([both, theirs[both]])

    @property
    def _ends(self) -> list[tuple[int, int]]:
        """The teacher's and the student's id that ends an answer or a text, where both have one."""
        if self.ends is not None:
            return [self.ends[::-1]]
        ends = (self.teacher.tokenizer.eos_token_id, self.student.tokenizer.eos_token_id)
        return [] if None in ends else [ends]
