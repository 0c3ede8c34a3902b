"""Documents that share a prompt, and the pairs among them.

    documents   x_0 ... x_{p-1}   |   x_p a_1 ... a_m   |   x_p b_1 ... b_n
    offsets     0                 |   p                 |   p
    sides       -1                |   CHOSEN            |   REJECTED

The prompt is x_0 ... x_p. A network computes its first p tokens once, and each answer sees them (`core.types`).
A prompt of one token has nothing to share: its answers have offset 0, and no document precedes them.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from potstill.core.errors import DataError
from potstill.core.types import CHOSEN, REJECTED
from potstill.data.pack_fields import GROUPS, OFFSETS, SIDES

PAIRS = "pairs"  # the key of a batch


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

    The pairs ascend by the number of the chosen document. Without these fields there are none, and no key.

    Raises: DataError for a group with several documents on one side.
    """
    if SIDES.name not in batch or GROUPS.name not in batch:
        return {}
    sides, groups = batch[SIDES.name], batch[GROUPS.name]
    chosen, rejected = (torch.nonzero((sides == side) & (groups >= 0))[:, 0] for side in (CHOSEN, REJECTED))
    is_pair = groups[chosen][:, None] == groups[rejected][None, :]
    if bool((is_pair.sum(0) > 1).any() or (is_pair.sum(1) > 1).any()):
        raise DataError("a group has several chosen or rejected documents; give each pair a group of its own")
    rows, columns = torch.nonzero(is_pair, as_tuple=True)
    return {PAIRS: torch.stack([chosen[rows], rejected[columns]])}
