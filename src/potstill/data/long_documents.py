"""Chooses the long documents of a text, and enough shorter ones that short contexts are not forgotten.

With documents of lengths n_d, minimum m and share r, all documents with n_d >= m are kept. Of the shorter ones, in
random order, as many are kept as hold at most r / (1 - r) tokens for each token of the long ones (arXiv:2410.02660 and
arXiv:2402.10171 train long contexts on such mixtures).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from potstill.core.counts import count_noun
from potstill.core.errors import DataError, UsageError
from potstill.core.notes import print_note
from potstill.data.token_dataset import TokenDataset, TokenizedDocument


@dataclass(frozen=True)
class LongDocuments:
    """A choice of documents of at least `min_tokens` tokens, and of shorter ones for `short_share` of the tokens.

    With 0 it is all documents.

    Raises: UsageError for a negative length, or a share outside [0, 1).
    """

    min_tokens: int = 0
    short_share: float = 0.0

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise UsageError(f"min_document_tokens is {self.min_tokens}; give a number of tokens, or 0 for all texts")
        if not 0 <= self.short_share < 1:
            raise UsageError(f"short_share is {self.short_share:g}; it is a share of the tokens, from 0 to below 1")


ALL_DOCUMENTS = LongDocuments()


def choose_long_documents(
    token_set: TokenDataset, choice: LongDocuments, seed: int, *, name: str
) -> tuple[Iterable[TokenizedDocument], dict[str, Any]]:
    """The documents of the corpus `name` to train on, and the facts of the choice for the card.

    Raises: DataError if no document is long enough.
    """
    if not choice.min_tokens:
        return token_set, {}
    lengths = np.diff(token_set.ends, prepend=0)
    indices = choose_indices(lengths, choice, seed=seed, name=name)
    is_long = lengths[indices] >= choice.min_tokens
    num_long, share = int(is_long.sum()), float(lengths[indices][~is_long].sum() / lengths[indices].sum())
    print_note(
        f"{name}: {count_noun(num_long, 'document')} of at least {choice.min_tokens:,} tokens, and shorter ones for "
        f"{100 * share:.0f} % of the tokens"
    )
    facts = {"long": num_long, "shorter": len(indices) - num_long, "short_share": share}
    return (token_set[i] for i in indices.tolist()), {"long_documents": facts}


def choose_indices(
    lengths: Int64[np.ndarray, " n"], choice: LongDocuments, *, seed: int, name: str
) -> Int64[np.ndarray, " chosen"]:
    """The indices of the chosen documents, ascending.

    Raises: DataError if no document of the corpus `name` is long enough.
    """
    is_long = lengths >= choice.min_tokens
    if not is_long.any():
        longest = count_noun(int(lengths.max(initial=0)), "token")
        raise DataError(
            f"no document of {name} that was read has {choice.min_tokens:,} tokens; the longest has {longest}: give a "
            f"smaller --min-document-tokens, more --tokens or other --data"
        )
    short = np.random.default_rng(seed).permutation(np.flatnonzero(~is_long))
    room = choice.short_share / (1 - choice.short_share) * int(lengths[is_long].sum())
    return np.sort(np.concatenate([np.flatnonzero(is_long), short[np.cumsum(lengths[short]) <= room]]))
