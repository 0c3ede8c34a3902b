"""The choice of long documents: all of them, and shorter ones for a share of the tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.core.errors import DataError, UsageError
from potstill.data.long_documents import LongDocuments, choose_indices, choose_long_documents
from potstill.data.token_dataset import TokenDataset, TokenizedDocument


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    minimum=st.integers(1, 50),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 5),
)
def test_every_long_document_is_kept_and_shorter_ones_have_at_most_their_share(
    lengths: list[int], minimum: int, share: float, seed: int
) -> None:
    sizes = np.array(lengths)
    if sizes.max() < minimum:
        with pytest.raises(DataError, match="the longest has"):
            choose_indices(sizes, LongDocuments(minimum, share), seed=seed, name="prose")
        return
    kept = choose_indices(sizes, LongDocuments(minimum, share), seed=seed, name="prose")
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert set(np.flatnonzero(sizes >= minimum)) <= set(kept)
    short = sizes[kept][sizes[kept] < minimum].sum()
    assert short <= share * sizes[kept].sum() + 1e-9
    left = np.setdiff1d(np.arange(len(sizes)), kept)
    if len(left):  # the next one would exceed the share
        total = sizes[kept].sum() + sizes[left].max()
        assert short + sizes[left].max() > share * total - 1e-9


def documents(*lengths: int) -> TokenDataset:
    rows = [TokenizedDocument([n] * n, [-100, *[n] * (n - 1)]) for n in lengths]
    return TokenDataset(enumerate(rows))


def test_the_documents_come_with_their_facts(capsys: pytest.CaptureFixture[str]) -> None:
    kept, facts = choose_long_documents(documents(30, 2, 40, 3, 2), LongDocuments(30, 0.1), 1, name="prose")
    assert facts == {"long_documents": {"long": 2, "shorter": 3, "short_share": pytest.approx(7 / 77)}}
    assert [len(document.input_ids) for document in kept] == [30, 2, 40, 3, 2]
    assert "prose: 2 documents of at least 30 tokens, and shorter ones for 9 % of the tokens" in capsys.readouterr().err


def test_without_a_minimum_nothing_is_left_out() -> None:
    everything = documents(30, 2)
    assert choose_long_documents(everything, LongDocuments(), 1, name="prose") == (everything, {})


@pytest.mark.parametrize(("minimum", "share"), [(-1, 0.2), (8, 1.0), (8, -0.1), (8, float("nan"))])
def test_a_choice_that_means_nothing_is_refused(minimum: int, share: float) -> None:
    with pytest.raises(UsageError, match=r"min_document_tokens is -1|short_share is"):
        LongDocuments(minimum, share)
