"""Several data sets as one: whole, or each with the share that its weight says."""

import json
from pathlib import Path

import pytest

from potstill.core.errors import DataError, UsageError
from potstill.data.hub import DATASET_ID, HubDataset
from potstill.data.mixture import LIMITED_BY_WEIGHT, load_mixture, parse_sources
from potstill.data.turns import to_messages
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


def test_an_exponent_gives_each_data_set_the_share_of_its_size_to_that_power(files: tuple[str, str]) -> None:
    sizes = [len(load_mixture(name)) for name in files]  # texts of equal lengths
    for exponent in (0.0, 0.5, 1.0):
        texts = list(load_mixture(files, exponent=exponent).documents["text"])
        large = sum(text.startswith("large") for text in texts)
        share = sizes[0] ** exponent / sum(size**exponent for size in sizes)
        assert large / len(texts) == pytest.approx(share, abs=0.02)
        assert len(texts) - large == sizes[1]  # the scarcest is taken whole
    assert load_mixture(files, exponent=1.0).digest == load_mixture(files).digest
    assert len(load_mixture(files, split="validation", exponent=0.0)) == len(load_mixture(files, split="validation"))


def test_the_exponent_one_half_gives_sets_of_400_and_100_the_shares_two_thirds_and_one_third(
    files: tuple[str, str],
) -> None:
    sources = load_mixture(files, exponent=0.5).provenance["sources"]
    sizes = [len(load_mixture(name)) for name in files]
    assert sum(source["weight"] for source in sources) == pytest.approx(1)
    assert sources[0]["weight"] / sources[1]["weight"] == pytest.approx((sizes[0] / sizes[1]) ** 0.5, rel=0.01)
    assert sources[0]["weight"] == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("suffix", "exponent", "message"),
    [
        ("", 1.5, "--mix-exponent is 1.5; it goes from 0"),
        ("", -0.5, "--mix-exponent is -0.5; it goes from 0"),
        (":2", 0.5, ":2.0 both give shares; omit one of them"),
    ],
)
def test_an_exponent_that_does_not_fit_is_refused(
    files: tuple[str, str], suffix: str, exponent: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_mixture([name + suffix for name in files], exponent=exponent)
    with pytest.raises(UsageError, match="mixes several data sets; give --data again"):
        load_mixture(files[0], exponent=0.5)


def test_pairs_among_chats_become_chats(tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Yes"), ("user", "And?"), ("assistant", "No")]
    chats = [{"messages": [{"role": r, "content": f"{c} {n}"} for r, c in turns]} for n in range(30)]
    pairs = [{"instruction": f"Add {n}", "input": "to 1", "output": f"{n + 1}"} for n in range(30)]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_mixture([str(tmp_path / "pairs.jsonl"), str(tmp_path / "chats.jsonl")], split="all")
    documents = [to_messages(document) for document in corpus.documents]
    assert (corpus.kind, len(documents)) == ("chat", 60)
    pair = next(messages for messages in documents if messages[0]["content"] == "Add 3\n\nto 1")
    assert pair == [{"role": "user", "content": "Add 3\n\nto 1"}, {"role": "assistant", "content": "4"}]
    assert sorted(map(len, documents)) == [2] * 30 + [4] * 30
