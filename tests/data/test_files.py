"""Files are read as what they say they are, and what is wrong with one is said with its line or byte."""

import bz2
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from potstill.core.errors import DataError, NotFound
from potstill.data.files import assign_splits, find_license, get_format, list_files, read_records

ROWS = [{"text": 'first, "quoted"\nline'}, {"text": "zweite Zeile 🙂"}]


def rows_of(path: Path) -> list[Any]:
    return [dict(record.row) for record in read_records(path)]


def as_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "list.jsonl": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "rows.csv": as_csv,
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "rows.arrow": lambda path: as_arrow(path, pa.ipc.new_stream),
    "file.arrow": lambda path: as_arrow(path, pa.ipc.new_file),
}
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def as_arrow(path: Path, open_writer: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(ROWS)
    with open_writer(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    compressed = path.with_name(name + suffix)
    compressed.write_bytes(COMPRESSORS[suffix](path.read_bytes()))
    assert rows_of(compressed) == ROWS


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("lines.jsonl", f"{json.dumps(CHAT)}\n\n{json.dumps(CHAT)}\n", 2),
        ("one.jsonl", json.dumps(CHAT), 1),
        ("list.json", json.dumps([CHAT, CHAT], indent=1), 2),
        ("one.json", json.dumps(CHAT, indent=1), 1),
    ],
)
def test_a_list_of_turns_is_a_chat_in_a_line_in_a_list_or_alone(
    tmp_path: Path, name: str, content: str, count: int
) -> None:
    (tmp_path / name).write_text(content)
    assert rows_of(tmp_path / name) == [{"messages": CHAT}] * count


def test_a_folder_of_save_to_disk_is_its_data(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-0123.arrow").touch()
    assert [file.name for file in list_files(tmp_path / "one")] == ["data-00000-of-00001.arrow"]
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "two")
    files = list_files(tmp_path / "two")
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "two/test/data-00000-of-00001.arrow",
        "two/train/data-00000-of-00001.arrow",
    ]
    assert all(rows_of(file) == ROWS for file in files)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz", "a.arrow"])
def test_a_pointer_to_data_is_named_with_the_command_that_fetches_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=r"is a Git LFS pointer and not the data; run `git lfs pull`"):
        rows_of(path)
    path.write_text("/annex/objects/MD5E-s12--4d7a.jsonl\n")
    with pytest.raises(DataError, match=r"is a git-annex pointer and not the data; run `git annex get`"):
        rows_of(path)


@pytest.mark.parametrize(
    ("name", "command"), [("a.zip", "unzip a.zip"), ("a.tar.gz", "tar -xf a.tar.gz"), ("a.tgz", "tar -xf a.tgz")]
)
def test_an_archive_is_named_with_the_command_that_unpacks_it(tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"is an archive; unpack it with `{command}`"):
        list_files(tmp_path / name)
    with pytest.raises(DataError, match=f"holds 1 files and none of .*; unpack its archive with `{command}`"):
        list_files(tmp_path)


def test_a_text_file_is_one_document_without_byte_order_mark_and_with_plain_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffCall me\r\nIshmael.\n".encode())
    assert rows_of(path) == [{"text": "Call me\nIshmael.\n"}]


def test_one_object_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"text": "a"}, indent=1))
    assert rows_of(path) == [{"text": "a"}]


def test_a_quote_in_a_tsv_file_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('text\tother\n"Hm\tb\nc\td"\n')
    assert rows_of(path) == [{"text": '"Hm', "other": "b"}, {"text": "c", "other": 'd"'}]


def test_a_field_longer_than_the_csv_module_likes_is_read_and_its_limit_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "a" * 200_000 + "\n")
    before = csv.field_size_limit(1000)
    try:
        assert len(rows_of(path)[0]["text"]) == 200_000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


BROKEN = {
    "bad JSON, with its line": ("a.jsonl", b'{"text": "a"}\n\n{"text": }\n', "line 3 is not valid JSON"),
    "bad JSON in a list, with its line": ("a.json", b'[{"text": "a"},\n {"text": }]', "line 2 is not valid JSON"),
    "a row that is no object": ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 is a list"),
    "a list of strings": ("a.json", b'["a", "b"]', "row 1 is a str"),
    "JSON nested without end": ("a.json", b"[" * 100_000, "nested too deeply"),
    "a zero byte, with its offset": ("a.txt", b"abc\ndef\0g", "zero byte at offset 7"),
    "not UTF-8, with its offset": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}', "byte 0xe4 at offset 24"),
    "UTF-16": ("a.txt", "hallo".encode("utf-16"), "zero byte at offset 3"),
    "no gzip file": ("a.txt.gz", b"plain text", "not a complete gzip file"),
    "half a gzip file": ("a.txt.gz", gzip.compress(os.urandom(999).hex().encode())[:200], "not a complete gzip file"),
    "no bzip2 file": ("a.txt.bz2", b"plain text", "cannot be read|not a complete .bz2 file"),
    "no xz file": ("a.txt.xz", b"plain text", "not a complete .xz file"),
    "half an xz file": ("a.txt.xz", lzma.compress(os.urandom(999).hex().encode())[:300], "not a complete .xz file"),
    "no Zstandard file": ("a.txt.zst", b"plain text", "cannot be read|not a complete .zst file"),
    "no Arrow file": ("a.arrow", b"text\nfirst\n", "not a complete Arrow file"),
    "a line that is a list of texts": (
        "a.jsonl",
        b'["a"]\n["b"]\n',
        "line 1 is a list; .* or a list of turns",
    ),
    "a damaged gzip file": ("a.txt.gz", gzip.compress(b"abc" * 99)[:-8] + b"12345678", "not a complete gzip file"),
    "no Parquet file": ("a.parquet", b"text\nfirst\n", "not a complete Parquet file"),
    "an empty Parquet file": ("a.parquet", b"", "not a complete Parquet file"),
    "too few fields": ("a.csv", b"text,label\na,b\nc\n", "line 3 has 1 fields where the header has 2"),
    "an open quote": ("a.csv", b'text\n"abc\n', "line 2 is not valid CSV"),
}


@pytest.mark.parametrize(("name", "content", "says"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_file_is_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        rows_of(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a complete Parquet file"):
        rows_of(path)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("a")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")  # what root, who may read anything, never meets

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="permission denied"):
        rows_of(path)


def test_a_file_that_is_gone_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        rows_of(tmp_path / "gone.txt")


def test_a_folder_gives_what_can_be_read_in_one_order_and_no_hidden_file(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl.gz", "sub/c.csv", ".git/d.txt", "README.md", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in list_files(tmp_path)] == ["a.jsonl.gz", "b.txt", "sub/c.csv"]


def test_a_folder_without_anything_to_read_and_an_unknown_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").touch()
    with pytest.raises(DataError, match=r"holds 1 files and none of \.txt"):
        list_files(tmp_path)
    with pytest.raises(DataError, match=r"is none of \.txt"):
        list_files(tmp_path / "notes.docx")


@pytest.mark.parametrize(
    ("name", "known"), [("a.TXT", ".txt"), ("a.json.gz", ".json"), ("a.tar.gz", ""), ("a.gz", ""), ("txt", "")]
)
def test_the_format_is_what_the_name_says(name: str, known: str) -> None:
    assert get_format(Path(name)) == known


@pytest.mark.parametrize(
    ("names", "sides"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], ([0], [1])),
        (["x.train.txt.gz", "x.dev.txt.gz"], ([0], [1])),
        (["test/a.txt", "train/a.txt"], ([1], [0])),
        (["train.csv", "categories.json"], ([0], [])),
        (["a.txt", "test.txt"], ([0], [1])),
        (["a.txt", "b.txt", "eval.jsonl", "test.txt"], ([0, 1], [2])),
        (["a.txt", "b.txt"], None),
        (["test.csv", "test_socratic.csv"], None),
        (["training.txt", "constraint.txt"], None),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "val.parquet"], ([0, 1], [2])),
    ],
)
def test_names_say_what_is_held_out(names: list[str], sides: tuple[list[int], list[int]] | None) -> None:
    assert assign_splits(names) == sides


def test_the_licence_that_lies_beside_a_file_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert find_license(tmp_path / "a.txt") is None
    (tmp_path / "LICENSE.md").write_text("\n  MIT License\n\nCopyright\n")
    assert find_license(tmp_path / "a.txt") == find_license(tmp_path) == "LICENSE.md: MIT License"
