"""Prompt lookup: the text's last n tokens occur earlier, and what followed them there is the draft.

For n = 3, 2, 1 the last n tokens are looked up; the first n with an earlier occurrence gives the draft, from the
earliest one. It costs no model, and pays where answers repeat their prompt: summaries, extraction, edits of code.

The released version differs in two points, which this file does not copy: it takes a continuation only if all of its 10
tokens exist, and so finds none near the end of a text. A shorter continuation is a shorter draft here.

Source: Saxena, "Prompt Lookup Decoding" (https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from potstill.decode.drafters.draft_setup import DrafterSpec, DraftSetup
from potstill.decode.drafters.drafter import Draft, DraftContext, Drafter

LONGEST_MATCH = 3


@dataclass
class NgramIndex:
    """Where each n-gram of a text first ends, for n up to `longest`."""

    longest: int
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_ids: int = 0

    def extend(self, ids: Sequence[int]) -> None:
        """Reads the ids that the text has gained. The n-grams at its very end have no continuation yet."""
        for end in range(max(self.num_ids, 1), len(ids)):
            for n in range(1, min(self.longest, end) + 1):
                self.ends.setdefault(tuple(ids[end - n : end]), end)
        self.num_ids = len(ids)

    def find_continuation(self, ids: Sequence[int]) -> int | None:
        """The position after the earliest occurrence of the longest suffix that occurs earlier."""
        for n in range(min(self.longest, len(ids)), 0, -1):
            if (end := self.ends.get(tuple(ids[-n:]))) is not None:
                return end
        return None


class PromptLookup(Drafter):
    """Drafts what followed the earliest occurrence of the text's last tokens, at most `longest_match` of them."""

    def __init__(self, *, longest_match: int = LONGEST_MATCH) -> None:
        self.longest_match = longest_match
        self.indices: dict[int, NgramIndex] = {}

    def start(self, slot: int, ids: Sequence[int], hidden: Float[Tensor, "T D"] | None = None) -> None:
        """A text begins, with an index of its own."""
        self.indices[slot] = NgramIndex(self.longest_match)

    def propose(self, context: DraftContext) -> Draft:
        """A chain of at most `limit` tokens; empty where the last token is new."""
        index = self.indices[context.slot]
        index.extend(context.ids)
        start = index.find_continuation(context.ids)
        length = min(context.limit, context.depth)
        return Draft() if start is None else Draft.chain(list(context.ids[start : start + length]))

    def free(self, slot: int) -> None:
        """Forgets the index of a text."""
        self.indices.pop(slot, None)


def make_lookup(setup: DraftSetup, argument: str) -> PromptLookup:
    """A drafter without a model.

    Raises: UsageError for a tree or a length by confidence.
    """
    setup.refuse_options("lookup", tree=True, confidence=True)
    return PromptLookup()


SPEC = DrafterSpec(
    name="lookup",
    argument="",
    help="what followed the last tokens where they occur earlier in the text",
    length="cost",
    make=make_lookup,
)
