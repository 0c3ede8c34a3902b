"""Documents that share a prompt, and the pairs among them.

    documents   x_0 ... x_{p-1}   |   x_p a_1 ... a_m   |   x_p b_1 ... b_n
    offsets     0                 |   p                 |   p
    sides       -1                |   CHOSEN            |   REJECTED

The prompt is x_0 ... x_p. A network computes its first p tokens once, and each answer sees them (`core.types`).
A prompt of one token has nothing to share: its answers have offset 0, and no document precedes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from potstill.core.errors import DataError
from potstill.core.types import BASELINE, CHOSEN, IGNORE, REJECTED
from potstill.data.pack_fields import GROUPS, OFFSETS, SIDES, get_field
from potstill.data.token_dataset import TokenizedDocument

PAIRS = "pairs"  # the key of a batch


def count_prompt_tokens(documents: Sequence[TokenizedDocument]) -> int:
    """How many tokens of their prompt the documents of a group begin with, each given whole.

    The first token that differs ends the prompt, so that one that a tokenizer merges across its border is no part of
    it. So does the first token that is trained on, even where all answers begin alike.
    """
    sizes = []
    first = np.array(documents[0].input_ids)
    for document in documents:
        length = min(len(first), len(document.input_ids))
        is_end = np.array(document.labels[:length]) != IGNORE
        is_end |= first[:length] != np.array(document.input_ids[:length])
        sizes.append(int(is_end.argmax()) if is_end.any() else length)
    return min(sizes)


def build_group(
    documents: Sequence[TokenizedDocument], sides: Sequence[int] = (), *, group: int, shared: bool = True
) -> list[TokenizedDocument]:
    """The documents of a group, given several answers to a prompt, each with the whole prompt before it.

    With `shared`, the prompt without its last token comes first, unlabeled. Each answer continues it, from its last
    token on. A single answer, and those to a prompt of one token, stand for themselves, and so do all without `shared`.
    The answers have `sides`, or none; they keep their own fields.
    """
    is_shared = shared and len(documents) > 1
    offset = max(0, count_prompt_tokens(documents) - 1) if is_shared else 0
    fields, side_fields = {GROUPS.name: group}, [{SIDES.name: side} for side in sides] or [{}] * len(documents)
    prompt = [TokenizedDocument(documents[0].input_ids[:offset], [IGNORE] * offset, fields)] if offset else []
    return prompt + [
        TokenizedDocument(
            document.input_ids[offset:],
            [IGNORE, *document.labels[offset + 1 :]],
            {**_drop_tokens(document.fields, offset), **fields, **side, OFFSETS.name: offset},
        )
        for document, side in zip(documents, side_fields, strict=True)
    ]


def _drop_tokens(fields: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The fields of a document without its first `count` tokens."""
    return {name: value[count:] if get_field(name).per == "token" else value for name, value in fields.items()}


def check_offsets(pack: Mapping[str, Tensor]) -> None:
    """Checks that every continuation of a pack has a prompt, and is told from the document before it by its positions.

    Raises: DataError for a continuation whose prompt is missing or too short, or that begins where another one ends.
    """
    if OFFSETS.name not in pack:
        return
    prompt_length, end = 0, 0
    for length, offset in zip(pack["lengths"].tolist(), pack[OFFSETS.name].tolist(), strict=True):
        if offset < 0 or offset > prompt_length:
            raise DataError(
                f"a document begins at position {offset}, and the prompt before it has {prompt_length} tokens; "
                "put the prompt before its continuations, in the same group"
            )
        if offset and offset == end:
            raise DataError(
                f"a continuation begins at position {offset}, where the one before it ends; its prompt cannot be found"
            )
        prompt_length, end = (prompt_length, offset + length) if offset else (length, 0)


def find_pairs(batch: Mapping[str, Tensor]) -> dict[str, Int[Tensor, "2 P"]]:
    """`pairs [2 P]` of a batch with `sides` and `groups`: the chosen and the rejected document of each group with both.

    The pairs ascend by the number of the chosen document. Answers that have a baseline are no pairs. Without these
    fields there are none, and no key.

    Raises: DataError for a group with several documents on one side.
    """
    if SIDES.name not in batch or GROUPS.name not in batch:
        return {}
    sides, groups = batch[SIDES.name], batch[GROUPS.name]
    is_paired = (groups >= 0) & ~torch.isin(groups, groups[sides == BASELINE])
    chosen, rejected = (torch.nonzero((sides == side) & is_paired)[:, 0] for side in (CHOSEN, REJECTED))
    is_pair = groups[chosen][:, None] == groups[rejected][None, :]
    if bool((is_pair.sum(0) > 1).any() or (is_pair.sum(1) > 1).any()):
        raise DataError("a group has several chosen or rejected documents; give each pair a group of its own")
    rows, columns = torch.nonzero(is_pair, as_tuple=True)
    return {PAIRS: torch.stack([chosen[rows], rejected[columns]])}
