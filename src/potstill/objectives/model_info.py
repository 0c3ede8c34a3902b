"""Facts of teacher and student; an objective builds its weights and token tables from them before training."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import VocabularyMismatch
from potstill.core.types import Head
from potstill.models.signals import find_projections, get_head, unwrap_model
from potstill.models.tokenizers.nearest_tokens import find_nearest_tokens
from potstill.models.tokenizers.token_bytes import TokenBytes, match_tokens, read_token_bytes
from potstill.models.tokenizers.vocabulary import count_shared_ids, count_usable_ids

EMBEDDINGS_PER_CHUNK = 2**13  # embeddings read at once


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """One model with its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def vocab_size(self) -> int:
        """The number of ids that are tokens with a row in the embedding."""
        return count_usable_ids(self.tokenizer, unwrap_model(self.model))

    @property
    def head(self) -> Head:
        """The output layer, cut to the ids that are tokens."""
        return get_head(self.model).crop_vocabulary(self.vocab_size)

    @property
    def hidden_size(self) -> int:
        """The width of the last hidden states."""
        return self.head.weight.shape[1]

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        num_layers: int = unwrap_model(self.model).config.get_text_config().num_hidden_layers
        return num_layers

    @property
    def relation_widths(self) -> dict[str, int]:
        """The widths of the queries, keys and values of its last attention layer.

        Raises: UnsupportedModel if the layer has no separate projections.
        """
        return {name: module.get_parameter("weight").shape[0] for name, module in find_projections(self.model).items()}

    @cached_property
    def pieces(self) -> TokenBytes:
        """The bytes of each id."""
        return read_token_bytes(self.tokenizer).crop(self.vocab_size)

    @torch.no_grad()
    def compute_embedding_std(self) -> float:
        """The standard deviation of the input embeddings, over all entries of all tokens."""
        embedding = unwrap_model(self.model).get_input_embeddings()
        device = next(embedding.parameters()).device
        parts = [
            embedding(ids).double() for ids in torch.arange(self.vocab_size, device=device).split(EMBEDDINGS_PER_CHUNK)
        ]
        return float(torch.cat([part.flatten() for part in parts]).std())


@dataclass(frozen=True, eq=False)
class PairInfo:
    """Student and teacher; `end_ids` are the ids that end an answer of each, if not their end-of-text ids."""

    student: ModelInfo
    teacher: ModelInfo
    end_ids: tuple[int, int] | None = None

    @cached_property
    def num_shared_ids(self) -> int | None:
        """The number of ids that are the same tokens in both; None if their tokenizers differ."""
        try:
            return count_shared_ids(self.teacher.tokenizer, self.student.tokenizer)
        except VocabularyMismatch:
            return None

    @property
    def logit_scale_ratio(self) -> float:
        """The scale of the teacher's head divided by that of the student's."""
        return self.teacher.head.scale / self.student.head.scale

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        """The number of compared ids of the student and of the teacher."""
        return (
            (self.student.vocab_size, self.teacher.vocab_size)
            if self.num_shared_ids is None
            else (self.num_shared_ids, self.num_shared_ids)
        )

    @cached_property
    def nearest_ids(self) -> Int[Tensor, " V_t"]:
        """For each of the teacher's ids the student's id with the most similar spelling, -1 if none is similar."""
        if self.num_shared_ids is not None:
            return torch.arange(self.num_shared_ids)
        ids = find_nearest_tokens(self.teacher.pieces, self.student.pieces)
        if self._matching_end_ids:
            ids[self._matching_end_ids[0][0]] = self._matching_end_ids[0][1]
        byte_fallbacks = torch.tensor(sorted(self.teacher.pieces.byte_fallback_ids), dtype=torch.long)
        other_ids = ids.clone()
        other_ids[byte_fallbacks] = -1
        ids[
            byte_fallbacks[torch.isin(ids[byte_fallbacks], other_ids)]
        ] = -1  # a byte fallback is written only where nothing else is
        return ids

    @cached_property
    def shared_token_ids(self) -> Int[Tensor, "2 S"]:
        """The ids of the student and of the teacher with the same bytes, or that both end a text; each id once.

        If one model has several ids for the same bytes, it prefers an id that is not a byte fallback, then the lowest
        id. The tokenizer itself makes the same choice.
        """
        if self.num_shared_ids is not None:
            return torch.arange(self.num_shared_ids).expand(2, -1)
        student_ids = match_tokens(self.teacher.pieces, self.student.pieces, special_pairs=self._matching_end_ids)
        teacher_ids = match_tokens(
            self.student.pieces, self.teacher.pieces, special_pairs=[(b, a) for a, b in self._matching_end_ids]
        )
        shared_student_ids = (
            (teacher_ids >= 0) & (student_ids[teacher_ids] == torch.arange(len(teacher_ids)))
        ).nonzero()[:, 0]
        return torch.stack([shared_student_ids, teacher_ids[shared_student_ids]])

    @property
    def _matching_end_ids(self) -> list[tuple[int, int]]:
        """The ids of teacher and student that end an answer or a text, if both have one."""
        if self.end_ids is not None:
            return [self.end_ids[::-1]]
        end_ids = (self.teacher.tokenizer.eos_token_id, self.student.tokenizer.eos_token_id)
        return [] if None in end_ids else [end_ids]
