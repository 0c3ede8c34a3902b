"""What an objective with weights or tables of its own has to know of the two networks before training."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import VocabularyMismatch
from potstill.core.types import Head
from potstill.models.pieces import Pieces, counterparts, pieces
from potstill.models.signals import head_of, plain
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
    """Student and teacher."""

    student: Side
    teacher: Side

    @cached_property
    def shared(self) -> int | None:
        """How many ids both read as the same tokens; None where their tokenizers differ."""
        try:
            return shared_ids(self.teacher.tokenizer, self.student.tokenizer)
        except VocabularyMismatch:
            return None

    @cached_property
    def same_strings(self) -> Int[Tensor, "2 S"]:
        """The ids of the student and of the teacher that stand for the same bytes, or both end a text."""
        ends = (self.teacher.tokenizer.eos_token_id, self.student.tokenizer.eos_token_id)
        also = [] if None in ends else [ends]
        ours = counterparts(self.teacher.pieces, self.student.pieces, also=also)
        theirs = (ours >= 0).nonzero()[:, 0]
        return torch.stack([ours[theirs], theirs])
