"""A corpus is the same whenever it is loaded, holds what its source holds, and says so."""

import gzip
import json
import platform
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from datasets import IterableDataset

from potstill.core.errors import DataError, NotFound, UsageError
from potstill.data import document_table, hub
from potstill.data.corpus import (
    HELD_OUT_DUPLICATE,
    Corpus,
    load_corpus,
    remove_held_out,
    stream_corpus,
)
from potstill.data.document_table import get_document_text
from potstill.data.row_reader import Route, RowReader
from potstill.data.split import fingerprint
from potstill.data.turns import to_row

Lines = Callable[..., Path]
NUMBERS = [{"text": f"document number {i}"} for i in range(400)]


def texts(corpus: Corpus) -> list[str]:
    return [get_document_text(document) for document in corpus.documents]


def test_train_and_validation_share_out_all_documents(lines: Lines) -> None:
    path = lines(NUMBERS)
    train, held, everything = (load_corpus(path, split=split) for split in ("train", "validation", "all"))
    assert set(texts(train)) | set(texts(held)) == set(texts(everything)) == {row["text"] for row in NUMBERS}
    assert not set(texts(train)) & set(texts(held))
    assert 5 <= len(held) <= 40


def test_documents_lie_in_the_order_of_their_hashes_and_keep_their_digest(lines: Lines) -> None:
    corpus = load_corpus(lines(NUMBERS), split="all")
    again = load_corpus(lines(NUMBERS[::-1], name="other.jsonl"), split="all")
    changed = load_corpus(lines([*NUMBERS[:-1], {"text": "another"}], name="third.jsonl"), split="all")
    hashes = [fingerprint(document) for document in corpus.documents]
    assert hashes == sorted(hashes)
    assert sorted(texts(corpus)) == sorted(row["text"] for row in NUMBERS)
    assert texts(corpus) == texts(again)
    assert corpus.digest == again.digest != changed.digest


def test_an_appended_document_moves_no_other_between_the_shares(lines: Lines) -> None:
    before = load_corpus(lines(NUMBERS), split="validation")
    after = load_corpus(lines([*NUMBERS, {"text": "one more"}]), split="validation")
    assert set(texts(before)) == set(texts(after)) - {"one more"}


def test_more_documents_than_one_chunk_are_all_there(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_table, "CHUNK", 7)
    assert sorted(texts(load_corpus(lines(NUMBERS), split="all"))) == sorted(row["text"] for row in NUMBERS)


def test_a_limit_draws_documents_from_everywhere_and_always_the_same(lines: Lines) -> None:
    path = lines(NUMBERS)
    few, fewer = (load_corpus(path, split="all", limit=n) for n in (40, 20))
    assert len(few) == 40
    assert texts(few) == texts(load_corpus(path, split="all", limit=40)) != [row["text"] for row in NUMBERS[:40]]
    assert texts(fewer) == texts(few)[:20]
    assert set(texts(few)) - {row["text"] for row in NUMBERS[:200]}
    assert len(load_corpus(path, split="all", limit=4000)) == 400


def test_pairs_and_chats_are_loaded_as_such(lines: Lines) -> None:
    pairs = load_corpus(lines([{"instruction": "a", "input": "b", "output": "c"}] * 2), split="all")
    assert (pairs.kind, pairs.documents[0]) == ("pairs", {"prompt": "a\n\nb", "response": "c"})
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    chats = load_corpus(lines([{"conversations": turns}]), split="all")
    assert chats.kind == "chat"
    assert to_row(chats.documents[0]) == {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    }
    assert texts(chats) == ["Hi\nHello"]
    assert texts(pairs)[0] == "a\n\nb\nc"


def test_rows_with_nothing_to_train_on_are_dropped_and_counted(lines: Lines) -> None:
    rows = [{"prompt": "a", "response": str(i)} for i in range(3)]
    corpus = load_corpus(lines([*rows, {"prompt": "", "response": "b"}, {"prompt": "a", "response": " "}]), split="all")
    assert len(corpus) == 3
    assert corpus.drop_counts == {"empty prompt": 1, "empty response": 1}


def test_columns_that_are_not_read_are_named(lines: Lines) -> None:
    corpus = load_corpus(lines([{"text": "a", "url": "b"}, {"text": "c", "date": "d"}]), split="all")
    assert corpus.provenance["unread_columns"] == ["date", "url"]
    assert corpus.provenance["split"] == "all"


def test_the_caller_may_name_the_columns(lines: Lines) -> None:
    path = lines([{"instruction": "a", "text": "b", "decoded": "c"}])
    corpus = load_corpus(path, split="all", columns={"prompt": "instruction", "response": "text"})
    assert corpus.documents[0] == {"prompt": "a", "response": "b"}


def test_a_book_becomes_long_documents_of_which_one_ends_where_the_book_does(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"paragraph {i}\n\n" for i in range(4000)))
    train, held, everything = (load_corpus(path, split=split) for split in ("train", "validation", "all"))
    assert texts(everything) == [path.read_text()]
    assert sum(len(text) for text in [*texts(train), *texts(held)]) == len(path.read_text())
    assert sum([*train.documents["whole"], *held.documents["whole"]]) == 1
    assert "in sections" in held.provenance["split"]


def test_each_text_file_of_a_folder_is_a_document(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i}")
    assert sorted(texts(load_corpus(tmp_path, split="all"))) == sorted(f"file {i}" for i in range(30))
    assert len(load_corpus(tmp_path)) + len(load_corpus(tmp_path, split="validation")) == 30


def test_files_named_for_it_are_what_is_held_out(lines: Lines, tmp_path: Path) -> None:
    lines(NUMBERS[:100], name="set/train.jsonl")
    lines(NUMBERS[100:110], name="set/dev.jsonl")
    lines(NUMBERS[110:120], name="set/test.jsonl")
    train, held = load_corpus(tmp_path / "set"), load_corpus(tmp_path / "set", split="validation")
    assert set(texts(train)) == {row["text"] for row in NUMBERS[:100]}
    assert set(texts(held)) == {row["text"] for row in NUMBERS[100:110]}
    assert train.provenance["split"] == "as its files or splits are named"


def test_files_named_for_a_test_are_held_out_where_none_is_named_train(lines: Lines, tmp_path: Path) -> None:
    lines(NUMBERS[:100], name="set/rows.jsonl")
    lines(NUMBERS[100:110], name="set/test.jsonl")
    train, held = load_corpus(tmp_path / "set"), load_corpus(tmp_path / "set", split="validation")
    assert set(texts(train)) == {row["text"] for row in NUMBERS[:100]}
    assert set(texts(held)) == {row["text"] for row in NUMBERS[100:110]}
    assert (train.provenance["held_out"], held.provenance["held_out"]) == (["test.jsonl"], [])
    assert len(load_corpus(tmp_path / "set" / "test.jsonl", split="all")) == 10


def test_documents_that_are_held_out_too_are_removed_whatever_their_format(lines: Lines) -> None:
    pairs = [{"prompt": f"Question {i}", "response": f" Answer {i}"} for i in range(40)]
    chats = [
        {"messages": [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": f"Answer {i}\n"}]}
        for i in range(30, 50)
    ]
    held_out = load_corpus(lines(chats, name="chats.jsonl"), split="all").documents
    corpus = load_corpus(lines(pairs), split="all")
    rest = remove_held_out(corpus, held_out)
    assert sorted(row["prompt"] for row in rest.documents) == sorted(row["prompt"] for row in pairs[:30])
    assert (rest.drop_counts, rest.digest) == ({HELD_OUT_DUPLICATE: 10}, corpus.digest)
    assert remove_held_out(rest, held_out) is rest
    with pytest.raises(DataError, match=r"all 10 documents of .* are held out too"):
        remove_held_out(load_corpus(lines(pairs[30:], name="few.jsonl"), split="all"), held_out)
    blank = Corpus("a/b", "text", datasets.Dataset.from_dict({}), None, None, {})
    stream = remove_held_out(stream_corpus(blank, stream_of(pairs), RowReader(), "all", None), held_out)
    assert sum(1 for _ in stream.documents) == 30
    assert stream.drop_counts[HELD_OUT_DUPLICATE] == 10


def test_a_folder_with_nothing_but_train_files_is_shared_out_by_hash(lines: Lines, tmp_path: Path) -> None:
    lines(NUMBERS, name="set/train.jsonl")
    train, held = load_corpus(tmp_path / "set"), load_corpus(tmp_path / "set", split="validation")
    assert len(train) + len(held) == 400
    assert len(held)


def test_files_of_two_kinds_are_no_data_set(lines: Lines, tmp_path: Path) -> None:
    lines(NUMBERS[:2], name="set/a.jsonl")
    lines([{"prompt": "a", "response": "b"}], name="set/b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl holds pairs where .*a\.jsonl holds text"):
        load_corpus(tmp_path / "set")


def test_files_of_one_kind_may_have_other_columns(lines: Lines, tmp_path: Path) -> None:
    lines([{"question": "a", "answer": "b"}], name="set/a.jsonl")
    lines([{"prompt": "c", "response": "d"}], name="set/b.jsonl")
    assert texts(load_corpus(tmp_path / "set", split="all")) == ["a\nb", "c\nd"]


@pytest.mark.slow
def test_stdlib_pins_python_and_text() -> None:
    train, held = load_corpus("stdlib"), load_corpus("stdlib", split="validation")
    assert train.provenance["python"] == platform.python_version()
    assert train.license == "PSF-2.0"
    assert len(held) / (len(train) + len(held)) == pytest.approx(0.05, abs=0.01)
    assert train.digest != held.digest


def test_docstrings_name_packages_licenses_and_text() -> None:
    train, held = load_corpus("docstrings"), load_corpus("docstrings", split="validation")
    assert "networkx 3." in train.provenance["packages"]
    assert train.license == "Apache-2.0 AND BSD-3-Clause"
    assert len(held) > 150
    assert not set(texts(train)) & set(texts(held))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty: it has no documents"),
        ("\n\n", "is empty: it has no documents"),
        ('{"text": ""}\n{"text": " "}\n', "holds nothing to train on: 2 with empty text"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "1 with no assistant turn"),
        ('{"text": "a"}\n{"text": 3}\n', "line 2 has int in `text`"),
        ('{"text": "a"}\n{"body": "b"}\n', "line 2 lacks `text`; it has `body`"),
        ('{"messages": [{"role": "narrator", "content": "a"}]}\n', "line 1 has a turn of the role 'narrator'"),
        ('{"grade": 1}\n', "has the columns `grade`, which fit no known format"),
    ],
)
def test_a_data_set_without_documents_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        load_corpus(path)
    assert str(path) in str(caught.value)


def test_an_empty_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="1 with empty text"):
        load_corpus(tmp_path / "a.txt.gz")


def test_a_csv_file_without_header_shows_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("How many?,18\nAnd now?,3\n")
    with pytest.raises(DataError, match=r"the header of .* has the columns `How many\?`, `18`, which fit no known"):
        load_corpus(tmp_path / "a.csv")


def test_documents_that_are_all_alike_have_no_validation_share(lines: Lines) -> None:
    path = lines([{"prompt": "a", "response": "b"}] * 3)
    assert len(load_corpus(path)) == 3
    with pytest.raises(DataError, match="holds no two different documents"):
        load_corpus(path, split="validation")


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "gone", "a/b/c", "gone/rows.parquet"])
def test_what_is_not_there_is_not_found(name: str) -> None:
    with pytest.raises(NotFound, match="there is no file or folder"):
        load_corpus(name)


def test_a_wrong_option_is_refused(lines: Lines) -> None:
    with pytest.raises(UsageError, match="split is 'dev'"):
        load_corpus(lines(NUMBERS), split="dev")
    with pytest.raises(UsageError, match="limit is 0"):
        load_corpus(lines(NUMBERS), limit=0)


def test_offline_a_hub_data_set_that_is_not_cached_is_not_found() -> None:
    with pytest.raises(
        NotFound, match=r"nobody/nothing is not a file or folder here, and the hub has .*HF_HUB_OFFLINE"
    ):
        load_corpus("nobody/nothing")


def test_what_the_hub_raises_becomes_one_sentence() -> None:
    says = r"a/b is not a file or folder here, and the hub's data set cannot be read: Config$"
    with pytest.raises(DataError, match=says), hub.explain_hub_errors("a/b"):
        raise ValueError("Config\nname is missing")
    with pytest.raises(DataError, match=r"^ours$"), hub.explain_hub_errors("a/b"):
        raise DataError("ours")


def stream_of(rows: list[dict[str, str]]) -> IterableDataset:
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)


def test_a_stream_gives_the_same_shares_as_a_file_as_it_is_read(lines: Lines) -> None:
    rows = [{"text": " "}, *NUMBERS]
    path = lines(rows)
    blank = Corpus("a/b", "text", datasets.Dataset.from_dict({}), None, "mit", {"source": "hub: a/b"})
    for split in ("train", "validation", "all"):
        whole = load_corpus(path, split=split)
        stream = stream_corpus(blank, stream_of(rows), RowReader(), split, None)
        assert sorted(texts(stream)) == sorted(texts(whole))
        assert stream.drop_counts == {"empty text": 1}
        assert (stream.kind, stream.digest, stream.license) == ("text", None, "mit")
        assert stream.documents.features == whole.documents.features


def test_a_stream_may_be_limited_and_has_no_length() -> None:
    blank = Corpus("a/b", "text", datasets.Dataset.from_dict({}), None, None, {})
    pairs = [{"question": str(i), "answer": "b", "extra": "c"} for i in range(50)]
    stream = stream_corpus(blank, stream_of(pairs), RowReader(), "all", 3)
    assert list(stream.documents) == [{"prompt": str(i), "response": "b"} for i in range(3)]
    assert stream.provenance["unread_columns"] == ["extra"]
    with pytest.raises(TypeError):
        len(stream)


ROUTE = Route("of", ("odd", "even"))
SORTED = [{"text": f"document number {i}", "of": "odd" if i % 2 else "even"} for i in range(400)]


def test_a_route_is_a_number_beside_the_text_and_changes_nothing_else(lines: Lines) -> None:
    path = lines(SORTED)
    for split in ("train", "validation", "all"):
        plain, routed = (load_corpus(path, split=split, label=route) for route in (None, ROUTE))
        assert routed.digest == plain.digest
        assert texts(routed) == texts(plain)
        assert routed.documents["route"][:] == [int(text.split()[-1]) % 2 == 0 for text in texts(plain)]
    assert "route" not in plain.documents.features
    assert (plain.provenance["unread_columns"], routed.provenance["unread_columns"]) == (["of"], [])


def test_a_stream_has_its_routes_too() -> None:
    blank = Corpus("a/b", "text", datasets.Dataset.from_dict({}), None, None, {})
    stream = stream_corpus(blank, stream_of(SORTED), RowReader(label=ROUTE), "all", None)
    assert all(one["route"] == (int(one["text"].split()[-1]) % 2 == 0) for one in stream.documents)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a", "of": "prime"}, "line 401 has 'prime' in `of`, and no teacher has that name; the names are odd"),
        ({"text": "a"}, "line 401 has no column `of` to route by; it has text"),
        ({"text": "a", "of": None}, "line 401 has 'None' in `of`"),
    ],
)
def test_a_document_that_is_for_nobody_is_refused_with_its_line(lines: Lines, row: dict[str, str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_corpus(lines([*SORTED, row]), label=ROUTE)


def test_texts_that_are_cut_into_sections_and_those_of_python_cannot_be_routed(lines: Lines) -> None:
    long = [{"text": "word " * 2000 + str(i), "of": "odd"} for i in range(3)]
    with pytest.raises(DataError, match="3 texts, which are cut into sections"):
        load_corpus(lines(long), label=ROUTE)
    assert len(load_corpus(lines(long), split="all", label=ROUTE)) == 3
    with pytest.raises(UsageError, match="stdlib has no column 'of'"):
        load_corpus("stdlib", label=ROUTE)


def test_a_stream_of_nothing_is_refused() -> None:
    blank = Corpus("a/b", "text", datasets.Dataset.from_dict({}), None, None, {})
    with pytest.raises(DataError, match="a/b holds nothing to train on: 5 with empty text"):
        stream_corpus(blank, stream_of([{"text": ""}] * 5), RowReader(), "train", None)


@pytest.mark.parametrize(
    ("path", "kind", "documents"),
    [
        ("instruct/hiyouga__LLaMA-Factory/data/alpaca_en_demo.json.gz", "pairs", 999),
        ("instruct/hiyouga__LLaMA-Factory/data/wiki_demo.txt.gz", "text", 1),
        ("instruct/hiyouga__LLaMA-Factory/data/c4_demo.jsonl.gz", "text", 300),
        ("math/openai__grade-school-math", "pairs", 7473),
        ("retrieval/google-deepmind__xquad/xquad.en.json.gz", "pairs", 1190),
        ("classify/PolyAI-LDN__task-specific-datasets/banking_data/test.csv", "text", 3080),
    ],
)
def test_public_corpora_are_read_whole(potstill_data: Path, path: str, kind: str, documents: int) -> None:
    corpus = load_corpus(potstill_data / path, split="all")
    assert (corpus.kind, len(corpus), dict(corpus.drop_counts)) == (kind, documents, {})
    json.dumps(dict(corpus.provenance))
