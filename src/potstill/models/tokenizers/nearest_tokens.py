"""For each token of one vocabulary, the token of another whose bytes are most similar (MinED).

Without a bound on the distance it would compare every pair of tokens: 10^10 pairs for two real vocabularies. Matches
beyond one edit mean little: any Chinese character has some neighbor too. Two strings within d edits share a string that
remains after at most d deletions in either. So it compares only tokens that share such a string (deletion
neighborhoods, arXiv:1008.1191): O(V L^d) strings for tokens of L bytes.
"""

from collections.abc import Iterator, Sequence

from jaxtyping import Int64
from torch import Tensor

from potstill.models.tokenizers.token_bytes import TokenBytes, match_tokens
from potstill.ops.edit_distance import bytes_to_columns, edit_distances

CHUNK_SIZE = 2**12  # tokens looked up together; bounds the pairs in memory


def find_nearest_tokens(source: TokenBytes, target: TokenBytes, *, max_distance: int = 1) -> Int64[Tensor, " V"]:
    """For each id of `source` the id of `target` at the least edit distance in bytes, at most `max_distance`.

    An id with the same bytes is at distance 0. Among ids at the same distance the lowest wins; -1 if none is near
    enough. Special tokens and byte-fallback tokens represent no string and match none.
    """
    nearest_ids = match_tokens(source, target)
    neighbors: dict[bytes, list[int]] = {}
    for j in _list_text_ids(target):
        for variant in _make_deletions(target.by_id[j], max_distance):
            neighbors.setdefault(variant, []).append(j)
    ids = sorted(
        (i for i in _list_text_ids(source) if nearest_ids[i] < 0), key=lambda i: len(source.by_id[i])
    )  # so that a chunk has tokens of similar length
    for start in range(0, len(ids), CHUNK_SIZE):
        chunk = ids[start : start + CHUNK_SIZE]
        candidates = [
            sorted(
                {j for variant in _make_deletions(source.by_id[i], max_distance) for j in neighbors.get(variant, ())}
            )
            for i in chunk
        ]
        pairs = [(i, j) for i, js in zip(chunk, candidates, strict=True) for j in js]
        for i, j in _find_nearest_pairs(pairs, source, target, max_distance):
            nearest_ids[i] = j
    return nearest_ids


def _find_nearest_pairs(
    pairs: Sequence[tuple[int, int]], source: TokenBytes, target: TokenBytes, max_distance: int
) -> Iterator[tuple[int, int]]:
    """For each source id of the pairs the nearest target id, with the source id, if one is within `max_distance`."""
    pair_distances = edit_distances(
        bytes_to_columns([source.by_id[i] for i, _ in pairs]), bytes_to_columns([target.by_id[j] for _, j in pairs])
    ).tolist()
    nearest_by_id: dict[int, tuple[int, int]] = {}
    for (i, j), distance in zip(pairs, pair_distances, strict=True):
        if distance <= max_distance and (distance, j) < nearest_by_id.get(i, (max_distance + 1, 0)):
            nearest_by_id[i] = (distance, j)
    return ((i, j) for i, (_, j) in nearest_by_id.items())


def _list_text_ids(pieces: TokenBytes) -> list[int]:
    """The ids that represent a string."""
    return [
        i
        for i, text in enumerate(pieces.by_id)
        if text and i not in pieces.special_ids and i not in pieces.byte_fallback_ids
    ]


def _make_deletions(text: bytes, max_deletions: int) -> set[bytes]:
    """`text`, and every string that at most `max_deletions` deletions leave of it."""
    variants = {text}
    for _ in range(max_deletions):
        variants |= {variant[:n] + variant[n + 1 :] for variant in variants for n in range(len(variant))}
    return variants
