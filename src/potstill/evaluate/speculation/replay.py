"""Replays a recorded text with another draft length: which passes it would have taken.

A drafter that reads a text and drafts its next token right does so from wherever the draft began. So a record tells of
each token whether the drafter has it: an accepted token yes, the target's own token after a rejection no. A chain of
another length then has the tokens of a row that the drafter has, up to the first that it has not, as in this text:

    token        0  1  2  3  4  5  6  7
    drafted      +  +  -  +  +  +  -  -
    length 2     [0  1  2][3  4  5][6][7]
    length 4     [0  1  2][3  4  5  6][7]

Acceptance differs by the position in a draft and by where drafts begin. A replay has both, where the formula of
independent acceptances (arXiv:2211.17192, equation 1) has neither. It is exact where the drafter's choice depends on
the text alone and each token is known.

Unknown is the target's token after a draft that it accepted whole: the draft ended before. Such tokens are taken as
drafted in the share in which drafts go on after an accepted token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from potstill.evaluate.speculation.recording import DraftPass, RecordedText

UNLIMITED = 2**31  # the depth of a draft that is as long as it may be


@dataclass(frozen=True)
class TokenRecord:
    """Of each new token of a text, whether the drafter has it (None: unknown), and how long a draft from here may be.

    A drafter such as a look-up may have no draft at a token, or a short one.
    """

    hits: Sequence[bool | None]
    depths: Sequence[int]


def read_tokens(text: RecordedText) -> TokenRecord:
    """What the passes of a text tell of its tokens."""
    hits: list[bool | None] = [None] * text.num_tokens
    depths = [UNLIMITED] * text.num_tokens
    for draft in text.passes:
        depth = UNLIMITED if draft.depth >= draft.limit else draft.depth
        end = draft.position + draft.accepted
        for token in range(draft.position, min(end + 1, text.num_tokens)):
            depths[token] = depth
            hits[token] = True if token < end else None
        if end < text.num_tokens - 1 and draft.limit > 0 and (draft.accepted < draft.depth or draft.depth == 0):
            hits[end] = False
    return TokenRecord(hits, depths)


def estimate_continuation(records: Sequence[TokenRecord]) -> float:
    """The share of tokens that the drafter has among those after one that it has; among all where there are none."""
    pairs = [(a, b) for record in records for a, b in pairwise(record.hits)]
    answers = [b for a, b in pairs if a and b is not None] or [b for _, b in pairs if b is not None]
    return sum(answers) / len(answers) if answers else 0.0


def fill_unknown(records: Sequence[TokenRecord]) -> list[TokenRecord]:
    """The records with an answer for every token; of the unknown ones the share `estimate_continuation` is a hit."""
    share, credit = estimate_continuation(records), 0.5
    results = []
    for record in records:
        hits: list[bool | None] = []
        for hit in record.hits:
            if hit is None:
                credit += share
                hit = credit >= 1
                credit -= hit
            hits.append(hit)
        results.append(TokenRecord(hits, record.depths))
    return results


def replay(record: TokenRecord, length: int, *, max_new_tokens: int) -> list[DraftPass]:
    """The passes of a text, without times, that chains of at most `length` tokens would take.

    `record` has no unknown token. No draft is longer than the text may become, as in the decoding loop.
    """
    passes, position, num_tokens = [], 1, len(record.hits)
    while position < num_tokens:
        limit = min(length, max_new_tokens - position - 1)
        depth = min(limit, record.depths[position])
        accepted = 0
        while accepted < min(depth, num_tokens - position - 1) and record.hits[position + accepted]:
            accepted += 1
        passes.append(DraftPass(position, limit, depth, depth, accepted))
        position += accepted + 1
    return passes
