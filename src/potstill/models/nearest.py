"""For each token of one vocabulary the token of another that is written most like it (MinED).

Unbounded, that compares every token with every other: 10^10 pairs for two real vocabularies, and what it finds beyond
one edit is no likeness (a character of Chinese has some neighbour too). Bounded, two strings within d edits have a
string in common that is left after at most d deletions in either, so that only tokens with one are compared
(deletion neighbourhoods, arXiv:1008.1191): O(V L^d) strings for tokens of L bytes.
"""

from collections.abc import Iterator, Sequence

from jaxtyping import Int64
from torch import Tensor

from potstill.models.pieces import Pieces, counterparts
from potstill.ops.edit import distances, letters

AT_ONCE = 2**12  # tokens looked up together, so that few pairs are held


def nearest(first: Pieces, second: Pieces, *, within: int = 1) -> Int64[Tensor, " V"]:
    """For each id of `first` the id of `second` at the least edit distance, in bytes, of at most `within`.

    An id with the same bytes is at distance 0; of several at one distance the lowest id; -1 where none is near enough.
    Special tokens and single bytes of a fallback stand for no string, and are never near one.
    """
    found = counterparts(first, second)
    near: dict[bytes, list[int]] = {}
    for j in _written(second):
        for left in _left(second.of[j], within):
            near.setdefault(left, []).append(j)
    asked = sorted((i for i in _written(first) if found[i] < 0), key=lambda i: len(first.of[i]))  # of like widths
    for start in range(0, len(asked), AT_ONCE):
        some = asked[start : start + AT_ONCE]
        others = [sorted({j for left in _left(first.of[i], within) for j in near.get(left, ())}) for i in some]
        pairs = [(i, j) for i, js in zip(some, others, strict=True) for j in js]
        for i, j in _best(pairs, first, second, within):
            found[i] = j
    return found


def _best(pairs: Sequence[tuple[int, int]], first: Pieces, second: Pieces, within: int) -> Iterator[tuple[int, int]]:
    """For each first id the second one that is nearest, of those within reach."""
    apart = distances(letters([first.of[i] for i, _ in pairs]), letters([second.of[j] for _, j in pairs])).tolist()
    best: dict[int, tuple[int, int]] = {}
    for (i, j), distance in zip(pairs, apart, strict=True):
        if distance <= within and (distance, j) < best.get(i, (within + 1, 0)):
            best[i] = (distance, j)
    return ((i, j) for i, (_, j) in best.items())


def _written(pieces: Pieces) -> list[int]:
    """The ids that stand for a string."""
    return [i for i, text in enumerate(pieces.of) if text and i not in pieces.special and i not in pieces.raw]


def _left(text: bytes, deleted: int) -> set[bytes]:
    """`text`, and what is left of it after at most so many deletions."""
    found = {text}
    for _ in range(deleted):
        found |= {one[:n] + one[n + 1 :] for one in found for n in range(len(one))}
    return found
