"""Checks that two tokenizers give the same ids to a text, by encoding probes and comparing tables, never widths."""

import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import VocabularyMismatch

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn {x: 3.14159}  # 0123456789",
    "naïve façade, Übergröße, 世界, こんにちは, 안녕하세요, Привет, مرحبا",
    "🎉👩‍👩‍👧 → ∑ ≤ ½",
)


def count_shared_ids(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> int:
    """The number of ids, from 0 on, that are the same token for both; potstill cuts heads to them.

    Families pad a vocabulary to a round width (Qwen: 151,936 and 152,064). The padding rows represent no token, so
    potstill cuts them off.

    Raises: VocabularyMismatch with the first text or id on which the two differ.
    """
    for text in PROBES:
        student_ids, teacher_ids = (
            tokenizer(text, add_special_tokens=False).input_ids for tokenizer in (student, teacher)
        )
        if student_ids != teacher_ids:
            raise VocabularyMismatch(
                f"teacher and student give {text[:20]!r} different ids ({teacher_ids[:4]} and {student_ids[:4]}); "
                f"choose a teacher with the student's tokenizer, or --objective dskdv2_eta, which compares across"
            )
    tokens_by_id = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (teacher, student)]
    num_shared = min(max(table) for table in tokens_by_id) + 1
    for i in range(num_shared):
        teacher_token, student_token = (table.get(i) for table in tokens_by_id)
        if teacher_token != student_token and teacher_token is not None and student_token is not None:
            raise VocabularyMismatch(
                f"id {i} is {teacher_token!r} for the teacher and {student_token!r} for the student; choose a "
                f"teacher with the "
                f"student's tokenizer, or --objective dskdv2_eta, which compares across"
            )
    return num_shared


def count_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids that represent a token; a head may have more rows."""
    return max(tokenizer.get_vocab().values()) + 1


def count_usable_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """How many ids represent a token that the model can read; words added to the tokenizer alone have no row."""
    return min(count_token_ids(tokenizer), len(model.get_input_embeddings().weight))


def check_token_id(largest_id: int, num_rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a token without a row in the embedding.

    Raises: VocabularyMismatch.
    """
    if largest_id >= num_rows:
        token = tokenizer.convert_ids_to_tokens(largest_id)
        raise VocabularyMismatch(
            f"the text holds the token {token!r} (id {largest_id}), and the tokenizer's {count_token_ids(tokenizer):,} "
            f"ids exceed the {num_rows:,} rows of the model's embedding; add rows (model.resize_token_embeddings), or "
            f"give the tokenizer that the model was trained with"
        )


def refuse_ids_without_rows(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Let the embedding of `model` refuse tokens without a row in one sentence, if the tokenizer has such."""
    embedding = model.get_input_embeddings()
    if count_token_ids(tokenizer) > len(embedding.weight):
        embedding.register_forward_pre_hook(functools.partial(_check_input_ids, tokenizer))


def _check_input_ids(tokenizer: PreTrainedTokenizerBase, embedding: nn.Module, inputs: tuple[Any, ...]) -> None:
    if inputs and inputs[0].numel():
        check_token_id(int(inputs[0].max()), len(embedding.get_parameter("weight")), tokenizer)
