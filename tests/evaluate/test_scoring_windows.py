import pytest
import torch

from potstill.core.errors import UsageError
from potstill.core.types import IGNORE, supervised_positions
from potstill.evaluate.scoring_windows import Row, ScoringConfig, Window, build_pack, build_packs, cut_windows


def text(length: int, *, prefix: int = 0) -> Row:
    ids = list(range(100, 100 + length))
    return Row(ids, [IGNORE, *ids[1:]], length, prefix)


def test_windows_are_those_of_the_drawing():
    drawn = [Window(0, 0, 0, 4), Window(0, 2, 4, 6), Window(0, 4, 6, 8), Window(0, 6, 8, 10)]
    assert cut_windows([text(10)], ScoringConfig(context=4)) == drawn


def test_the_last_window_is_as_full_as_the_others():
    assert cut_windows([text(9)], ScoringConfig(context=4))[-1] == Window(0, 5, 8, 9)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 20])
@pytest.mark.parametrize(("context", "stride"), [(4, 1), (4, 2), (5, 3), (8, None)])
def test_every_token_is_scored_exactly_once_and_no_window_exceeds_the_context(prefix, length, context, stride):
    row = text(length, prefix=prefix)
    scored = []
    for batch, _ in build_packs([row], ScoringConfig(context=context, stride=stride, batch_tokens=10)):
        scored += supervised_positions(batch)[1].tolist()
        assert batch["position_ids"].max() < context
    assert sorted(scored) == list(row.input_ids[1:])


def test_every_window_opens_with_the_prefix():
    row = text(10, prefix=1)
    (packed,) = build_packs([row], ScoringConfig(context=4))
    opens = packed.batch["position_ids"] == 0
    assert packed.batch["input_ids"][opens].tolist() == [100] * int(opens.sum())


def test_windows_that_score_nothing_are_not_read():
    ids = list(range(20))
    row = Row(ids, [IGNORE] * 18 + ids[18:], 2)
    assert cut_windows([row], ScoringConfig(context=4)) == [Window(0, 16, 18, 20)]


def test_owners_name_the_row_of_each_window():
    rows = [text(3), text(10), text(5)]
    chosen = cut_windows(rows, ScoringConfig(context=4))
    packed = build_pack(rows, chosen)
    assert packed.row_indices.tolist() == [window.row for window in chosen]
    _, targets, segment = supervised_positions(packed.batch)
    assert torch.bincount(packed.row_indices[segment]).tolist() == [2, 9, 4]
    assert len(targets) == 15


def test_batches_stay_below_their_tokens_unless_one_window_is_longer():
    sizes = [
        pack.batch["input_ids"].shape[1]
        for pack in build_packs([text(6), text(3), text(3)], ScoringConfig(batch_tokens=7))
    ]
    assert sizes == [6, 6]
    assert [p.batch["input_ids"].shape[1] for p in build_packs([text(6)], ScoringConfig(batch_tokens=1))] == [6]


@pytest.mark.parametrize(
    "reading", [ScoringConfig(context=4, stride=4), ScoringConfig(context=4, stride=0), ScoringConfig(context=1)]
)
def test_a_window_without_context_is_refused(reading):
    with pytest.raises(UsageError, match="stride"):
        cut_windows([text(9)], reading)
