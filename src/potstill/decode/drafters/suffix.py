"""Suffix decoding: the longest suffix of the text that occurs earlier, here or in past answers, votes on the draft.

All continuations of the longest match form a tree with counts. A node's score is the product of the shares of its path,

    score(node) = count(node) / count(parent) * score(parent),

and the draft takes the best nodes. A longer match is a better predictor, so the draft has at most `TOKENS_PER_MATCH`
tokens for each token of the match.

Source: Oliaro et al., "SuffixDecoding" (arXiv:2411.04975), sections 3.1 and 3.2. There a suffix tree counts all
occurrences; here an index of token pairs finds the latest `MOST_MATCHES`.
"""

import heapq
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from potstill.decode.drafters.draft_setup import DrafterSpec, DraftSetup
from potstill.decode.drafters.drafter import Draft, DraftContext, Drafter

TOKENS_PER_MATCH = 4
LONGEST_MATCH = 32
MOST_MATCHES = 64
PAST_TOKENS = 200_000


class Place(NamedTuple):
    """A position in a text: the continuation of what stands before it."""

    text: int
    position: int


class SuffixIndex:
    """Texts by number, and the places after each pair of tokens in them."""

    def __init__(self) -> None:
        self.texts: OrderedDict[int, list[int]] = OrderedDict()
        self.places: defaultdict[tuple[int, ...], dict[Place, None]] = defaultdict(dict)
        self.num_tokens = 0

    def extend(self, text: int, ids: Sequence[int]) -> None:
        """Reads the ids that a text has gained."""
        indexed = self.texts.setdefault(text, [])
        for position in range(len(indexed), len(ids)):
            if position >= 1:
                self.places[tuple(ids[position - 1 : position])][Place(text, position)] = None
            if position >= 2:
                self.places[tuple(ids[position - 2 : position])][Place(text, position)] = None
        self.num_tokens += len(ids) - len(indexed)
        indexed.extend(ids[len(indexed) :])

    def remove(self, text: int) -> None:
        """Forgets a text."""
        ids = self.texts.pop(text)
        self.num_tokens -= len(ids)
        for position in range(1, len(ids)):
            for n in (1, 2):
                key = tuple(ids[position - n : position])
                if len(key) == n and key in self.places:
                    self.places[key].pop(Place(text, position), None)
                    if not self.places[key]:
                        del self.places[key]

    def find_longest(self, ids: Sequence[int]) -> tuple[int, list[Place]]:
        """The length of the longest suffix of `ids` that occurs before, and the places after its occurrences."""
        for n in (2, 1):
            places = self.places.get(tuple(ids[-n:])) if len(ids) >= n else None
            if places:
                latest = [place for place, _ in zip(reversed(places), range(MOST_MATCHES), strict=False)]
                lengths = [self._match_length(ids, place) for place in latest]
                longest = max(lengths)
                return longest, [place for place, length in zip(latest, lengths, strict=True) if length == longest]
        return 0, []

    def get_continuation(self, place: Place, length: int) -> list[int]:
        """At most `length` tokens from a place on."""
        return self.texts[place.text][place.position : place.position + length]

    def _match_length(self, ids: Sequence[int], place: Place) -> int:
        text, length = self.texts[place.text], 0
        most = min(LONGEST_MATCH, len(ids), place.position)
        while length < most and text[place.position - 1 - length] == ids[-1 - length]:
            length += 1
        return length


class SuffixDrafter(Drafter):
    """Drafts the likeliest continuations of the longest match, as a tree or, with `tree` off, as a chain.

    It remembers the last `past_tokens` tokens of finished texts; 0 remembers none.
    """

    def __init__(self, *, tree: bool = False, past_tokens: int = PAST_TOKENS) -> None:
        self.tree, self.past_tokens = tree, past_tokens
        self.index = SuffixIndex()
        self.text_numbers: dict[int, int] = {}  # by slot
        self._num_texts = 0

    def start(self, slot: int, ids: Sequence[int], hidden: Float[Tensor, "T D"] | None = None) -> None:
        """A text begins; its prompt is the first that is looked up."""
        self.text_numbers[slot] = self._num_texts
        self._num_texts += 1
        self.index.extend(self.text_numbers[slot], ids)

    def propose(self, context: DraftContext) -> Draft:
        """At most `limit` tokens with the best scores; empty where the last token is new."""
        self.index.extend(self.text_numbers[context.slot], context.ids)
        match_length, places = self.index.find_longest(context.ids)
        limit = min(context.limit, TOKENS_PER_MATCH * match_length)
        continuations = [self.index.get_continuation(place, min(context.depth, limit)) for place in places]
        if not self.tree:
            return Draft.chain(_find_likeliest_path(continuations)[:limit])
        nodes = list(_iterate_best(continuations, limit))
        return Draft(tokens=[token for token, _ in nodes], parents=[parent for _, parent in nodes])

    def free(self, slot: int) -> None:
        """A text has ended; it stays in the index until newer ones need its room."""
        if self.text_numbers.pop(slot, None) is None:
            return
        self._shrink(self.past_tokens)

    def forget(self) -> None:
        """Forgets all texts that have ended."""
        self._shrink(0)

    def _shrink(self, num_tokens: int) -> None:
        """Removes texts that have ended, the oldest first, until `num_tokens` are left."""
        active = set(self.text_numbers.values())
        for text in [text for text in self.index.texts if text not in active]:
            if self.index.num_tokens <= num_tokens:
                break
            self.index.remove(text)


def _iterate_best(continuations: Sequence[Sequence[int]], limit: int) -> Iterator[tuple[int, int]]:
    """(token, parent) of the nodes with the best scores, parents first; of equal scores the earlier found."""
    heap: list[tuple[float, int, int, int, list[Sequence[int]]]] = []
    num_found = 0

    def push_children(parent: int, depth: int, score: float, members: Sequence[Sequence[int]]) -> None:
        nonlocal num_found
        groups: dict[int, list[Sequence[int]]] = {}
        for member in members:
            if len(member) > depth:
                groups.setdefault(member[depth], []).append(member)
        for group in groups.values():
            heapq.heappush(heap, (-score * len(group) / len(members), num_found, parent, depth, group))
            num_found += 1

    push_children(-1, 0, 1.0, continuations)
    for node in range(limit):
        if not heap:
            return
        score, _, parent, depth, group = heapq.heappop(heap)
        yield group[0][depth], parent
        push_children(node, depth + 1, -score, group)


def _find_likeliest_path(continuations: Sequence[Sequence[int]]) -> list[int]:
    """The tokens of the chain that takes the most frequent continuation at each node."""
    members, path = [list(member) for member in continuations if member], list[int]()
    while members:
        depth = len(path)
        token = Counter(member[depth] for member in members).most_common(1)[0][0]
        path.append(token)
        members = [member for member in members if member[depth] == token and len(member) > depth + 1]
    return path


def make_suffix(setup: DraftSetup, argument: str) -> SuffixDrafter:
    """A drafter without a model; `--tree` gives the number of its nodes.

    Raises: UsageError for a length by confidence.
    """
    setup.refuse_options("suffix", confidence=True)
    return SuffixDrafter(tree=not setup.is_chain)


SPEC = DrafterSpec(
    name="suffix",
    argument="",
    help="what followed the longest match in the text and in past answers, by counts",
    length="cost",
    make=make_suffix,
)
