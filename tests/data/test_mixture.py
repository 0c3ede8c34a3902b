"""Several data sets as one: whole, or each with the share that its weight says."""

import json
from pathlib import Path

import pytest

from potstill.core.errors import DataError, UsageError
from potstill.data.hub import DATASET_ID, HubDataset
from potstill.data.mixture import LIMITED_BY_WEIGHT, load_mixture, parse_sources
from potstill.models.locate import HUB_ID
from potstill.stages.preflight import StageInputs


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Two files of texts of equal lengths: 400 and 100."""
    for name, count in (("large", 400), ("small", 100)):
        rows = [{"text": f"{name} {n:04d} " + "still " * 10} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "large.jsonl"), str(tmp_path / "small.jsonl")


def test_without_weights_every_document_is_taken_once(files: tuple[str, str]) -> None:
    corpus = load_mixture(files, split="all")
    assert (len(corpus), len(set(corpus.documents["text"]))) == (500, 500)
    assert corpus.digest == load_mixture(files[::-1], split="all").digest
    assert corpus.name == f"{files[0]} + {files[1]}"


@pytest.mark.parametrize(("weights", "share"), [(("0.3", "0.7"), 0.3), (("1", "3"), 0.25), (("0.9", "0.1"), 0.9)])
def test_a_weight_is_the_share_of_the_text(files: tuple[str, str], weights: tuple[str, str], share: float) -> None:
    data = [f"{name}:{weight}" for name, weight in zip(files, weights, strict=True)]
    corpus = load_mixture(data)
    texts = list(corpus.documents["text"])
    assert len(set(texts)) == len(texts)
    assert sum(text.startswith("large") for text in texts) / len(texts) == pytest.approx(share, abs=0.02)
    train = sum(len(load_mixture(name)) for name in files)
    assert corpus.drop_counts[LIMITED_BY_WEIGHT] == train - len(texts)
    held_out = load_mixture(
        [f"{name}:{weight}" for name, weight in zip(files, weights, strict=True)], split="validation"
    )
    assert len(held_out) == sum(len(load_mixture(name, split="validation")) for name in files)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("a:0.3", "b"), "b has no weight and others have one"),
        (("a:0", "b:1"), "the weight 0; leave it out"),
        (("a:0.3", "a:0.7"), "--data a is given twice"),
    ],
)
def test_weights_that_do_not_fit_are_refused(data: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_sources(data)
    with pytest.raises(UsageError, match=message):
        StageInputs(data=(data,)).check()


def test_two_kinds_are_not_mixed(files: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    with pytest.raises(DataError, match=r"holds pairs where .*large\.jsonl holds text"):
        load_mixture([files[0], str(tmp_path / "pairs.jsonl")], split="all")


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a:0.5").mkdir()
    assert parse_sources(str(tmp_path / "a:0.5"))[0].weight is None


def test_a_revision_follows_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    source = HubDataset("owner/name@refs/pr/1:part")
    assert (source.repository, source.revision, source.config) == ("owner/name", "refs/pr/1", "part")
    assert DATASET_ID.fullmatch("owner/name@v1.0")
    assert HUB_ID.fullmatch("owner/name@main")
