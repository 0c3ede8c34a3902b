"""A replayed record has the passes that the loop would take."""

import random
from collections.abc import Sequence
from statistics import fmean

import pytest

from potstill.evaluate.speculation.recording import DraftPass, RecordedText
from potstill.evaluate.speculation.replay import (
    UNLIMITED,
    TokenRecord,
    estimate_continuation,
    fill_unknown,
    read_tokens,
    replay,
)

MOST = 10_000  # new tokens


def simulate(hits: Sequence[bool], depths: Sequence[int], lengths: Sequence[int], most: int = MOST) -> list[DraftPass]:
    """The passes of a drafter that has the tokens of `hits`, and drafts at most `depths[i]` tokens from token i."""
    passes, position = [], 1
    while position < len(hits):
        limit = min(lengths[len(passes) % len(lengths)], most - position - 1)
        depth, accepted = min(limit, depths[position]), 0
        while accepted < min(depth, len(hits) - position - 1) and hits[position + accepted]:
            accepted += 1
        passes.append(DraftPass(position, limit, depth, depth, accepted))
        position += accepted + 1
    return passes


def draw_hits(num_tokens: int, seed: int, *, stay: float = 0.8) -> list[bool]:
    """Hits and misses that come in runs, as those of a look-up do."""
    generator, hits = random.Random(seed), [False]
    while len(hits) < num_tokens:
        hits.append(hits[-1] if generator.random() < stay else not hits[-1])
    return hits


def longest_run(hits: Sequence[bool]) -> int:
    runs = "".join("+" if hit else "-" for hit in hits).split("-")
    return max(map(len, runs))


def test_the_example_of_the_module() -> None:
    hits = [symbol == "+" for symbol in "?++-+++--"]
    record = TokenRecord(hits, [UNLIMITED] * len(hits))
    for length, positions in ((2, [1, 4, 7, 8]), (4, [1, 4, 8])):
        passes = replay(record, length, max_new_tokens=MOST)
        assert [each.position for each in passes] == positions


@pytest.mark.parametrize("seed", range(5))
def test_a_record_of_long_drafts_gives_the_passes_of_every_shorter_length(seed: int) -> None:
    hits = draw_hits(300, seed)
    longest = longest_run(hits) + 1  # no draft is accepted whole, so every token is known
    depths = [MOST] * len(hits)
    record = read_tokens(RecordedText(simulate(hits, depths, [longest]), len(hits)))
    assert [hit for hit in record.hits[1:-1] if hit is None] == []
    for length in range(1, longest + 1):
        assert replay(record, length, max_new_tokens=MOST) == simulate(hits, depths, [length])


def test_a_short_or_missing_draft_stays_short() -> None:
    hits = draw_hits(400, 7)
    depths = [0 if not any(hits[n : n + 2]) else 3 for n in range(len(hits))]
    record = read_tokens(RecordedText(simulate(hits, depths, [50]), len(hits)))
    replayed = replay(record, 2, max_new_tokens=MOST)
    assert {each.depth for each in replayed} == {0, 2}
    assert fmean(each.depth for each in replayed) == pytest.approx(
        fmean(each.depth for each in simulate(hits, depths, [2])), abs=0.2
    )


def test_drafts_end_where_the_text_must() -> None:
    record = TokenRecord([True] * 10, [UNLIMITED] * 10)
    passes = replay(record, 4, max_new_tokens=10)
    assert [(each.position, each.limit, each.accepted) for each in passes] == [(1, 4, 4), (6, 3, 3)]


@pytest.mark.parametrize("stay", [0.55, 0.8, 0.95])
def test_unknown_tokens_change_the_tokens_per_pass_little(stay: float) -> None:
    hits = draw_hits(4000, 3, stay=stay)
    depths = [MOST] * len(hits)
    passes = simulate(hits, depths, [8, 8, 8, 1, 8, 8, 8, 2, 8, 8, 8, 4])
    (record,) = fill_unknown([read_tokens(RecordedText(passes, len(hits)))])
    for length in (1, 2, 4, 8):
        replayed, true = replay(record, length, max_new_tokens=MOST), simulate(hits, depths, [length])
        assert len(replayed) == pytest.approx(len(true), rel=0.03)


def test_a_drafter_that_has_every_token_is_taken_to_have_the_unknown_ones() -> None:
    hits = [True] * 100
    passes = simulate(hits, [MOST] * 100, [1])
    record = read_tokens(RecordedText(passes, 100))
    assert record.hits[2::2] == [None] * 49
    assert estimate_continuation([record]) == 1.0
    (filled,) = fill_unknown([record])
    assert all(filled.hits[1:])
    assert estimate_continuation([TokenRecord([None], [1])]) == 0.0
