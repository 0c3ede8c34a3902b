"""Batches of answers that share a prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.core.types import CHOSEN, IGNORE, REJECTED
from potstill.data.packing import Pack, collate
from potstill.data.shared_prompts import build_group
from potstill.data.token_dataset import TokenizedDocument
from potstill.train.rollouts.base import Document, join_documents

PROMPTS, ANSWERS = (7, 1, 4), ((5, 8), (3, 2), (6, 6))  # tokens of each prompt, and of its two answers


def make_pair(number: int, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[TokenizedDocument]:
    """The documents of a chosen and a rejected answer; those to a prompt of several tokens share it."""
    wholes = [TokenizedDocument([*prompt, *answer], [IGNORE] * len(prompt) + [*answer]) for answer in answers]
    return build_group(wholes, (CHOSEN, REJECTED), group=number)


def make_pack(documents: Sequence[TokenizedDocument]) -> Pack:
    """The documents end to end, in this order."""
    tensors = [
        Document(
            torch.tensor(document.input_ids),
            torch.tensor(document.labels),
            fields={name: torch.tensor(value) for name, value in document.fields.items()},
        )
        for document in documents
    ]
    return join_documents(tensors)


def shared_packs(*, seed: int = 2) -> list[Pack]:
    """Two packs: a pair, a text and a pair whose prompt has one token; and a pair."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 97, (length,), generator=generator).tolist()

    pairs = [
        make_pair(number, draw(prompt), [draw(length) for length in answers])
        for number, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
    ]
    text = draw(6)
    return [make_pack([*pairs[0], TokenizedDocument(text, [IGNORE, *text[1:]]), *pairs[1]]), make_pack(pairs[2])]


def shared_batch() -> dict[str, Tensor]:
    """Three pairs, two of which share a prompt, and a text."""
    return collate(shared_packs())
