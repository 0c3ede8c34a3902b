"""Describes preferences: how many pairs or labeled answers, how long their sides are, and some with their tokens."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError
from potstill.core.types import CHOSEN
from potstill.data.corpus import Corpus
from potstill.data.document_table import get_document_text
from potstill.data.pack_fields import GROUPS, SIDES
from potstill.data.preference_tokens import describe_left_out, list_sides, tokenize_groups
from potstill.data.preview import PERCENTILES, count_last_trained, describe_packs, split_pieces
from potstill.data.token_dataset import TokenDataset
from potstill.data.tokenize import Rendering


def describe_preferences(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    examples: int = 3,
    length: int | None = None,
    rendering: Rendering | None = None,
) -> dict[str, Any]:
    """What `data.preview.describe` says of a corpus, with the counts of its sides; an example is a group.

    Raises: DataError as `tokenize_groups` does, or if no row is left.
    """
    groups = (list_sides(number, document) for number, document in enumerate(corpus.documents))
    tokens, counts = tokenize_groups(corpus, groups, tokenizer, rendering=rendering)
    if not counts.groups:
        raise DataError(f"no preference of {corpus.name} can be trained on, {describe_left_out(counts)}")
    members = [list(indices) for _, indices in groupby(range(len(tokens)), key=lambda i: tokens.fields[GROUPS.name][i])]
    lengths = np.diff(tokens.ends, prepend=0)
    sizes = [int(sum(lengths[i] for i in indices)) for indices in members]
    chosen_examples = [round(position) for position in np.linspace(0, len(members) - 1, min(examples, len(members)))]
    description = {
        "name": corpus.name,
        "kind": corpus.kind,
        "documents": counts.groups,
        "tokens": tokens.num_tokens,
        "trained_tokens": tokens.num_trained,
        "trained_share": tokens.num_trained / tokens.num_tokens,
        "bytes": sum(len(get_document_text(document).encode()) for document in corpus.documents),
        "token_percentiles": {str(p): round(float(np.percentile(sizes, p))) for p in PERCENTILES},
        "last_trained": count_last_trained(tokens, tokenizer),
        "preferences": counts.to_dict(),
        "dropped": dict(counts.left_out),
        "bad_rows": [*corpus.bad_rows, *tokens.report.bad_rows],
        **tokens.report.to_dict(),
        "licence": corpus.license,
        "digest": corpus.digest,
        "provenance": dict(corpus.provenance),
        "examples": [_describe_group(tokens, members[i], tokenizer) for i in chosen_examples],
    }
    if length is None:
        return description
    fitting = [tokens[i] for indices, size in zip(members, sizes, strict=True) if size <= length for i in indices]
    num_long = sum(size > length for size in sizes)
    packs = {"packs": describe_packs(fitting, length)} if fitting else {}
    return {**description, **packs, "preferences": {**counts.to_dict(), "too_long": num_long}}


def _describe_group(
    tokens: TokenDataset, indices: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Mapping[str, Any]:
    """The number of a row, the pieces of its prompt, and those of each side after it."""
    documents = {i: tokens[i] for i in indices}
    pieces = {i: split_pieces(document, tokenizer) for i, document in documents.items()}
    sides = {i: int(document.fields[SIDES.name]) for i, document in documents.items()}
    return {
        "document": int(tokens.documents[indices[0]]),
        "pieces": [piece for i in indices if sides[i] < 0 for piece in pieces[i]],
        "sides": {("chosen" if sides[i] == CHOSEN else "rejected"): pieces[i] for i in indices if sides[i] >= 0},
    }
