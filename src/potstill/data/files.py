"""Reads files and folders as rows: text, JSON, JSON lines, CSV, TSV, Parquet and Arrow, also compressed.

Compressed are .gz, .bz2, .xz and .zst. A folder of `save_to_disk` is its Arrow files. In JSON a list of turns is a row
with the column `messages`. A `.txt` file is one row with the column `text`. A `.csv` file has a header and the usual
quotes. A `.tsv` file has a header too, but its quotes are plain characters and its fields hold no line break, as the
media type text/tab-separated-values defines. Text is UTF-8. An error names the first byte that is not.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from potstill.core.errors import DataError, NotFound, get_first_line
from potstill.data.compression import COMPRESSIONS, DAMAGE_ERRORS, find_unpack_command, open_file, strip_compression

BOM = "\ufeff"
TRAIN_PATTERN = re.compile(r"(^|[-_./])train([-_./]|$)", re.IGNORECASE)
VALIDATION_PATTERN = re.compile(r"(^|[-_./])(validation|valid|val|dev|eval|evaluation)([-_./]|$)", re.IGNORECASE)
TEST_PATTERN = re.compile(r"(^|[-_./])test([-_./]|$)", re.IGNORECASE)
SAVED_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")  # what save_to_disk writes beside the data
CACHE_PATTERN = re.compile(r"cache-.*\.arrow")  # what `map` leaves there


class Record(NamedTuple):
    """One row of a file, and its place there, such as `train.jsonl, line 7`."""

    row: Mapping[str, Any]
    location: str


def read_records(path: Path) -> Iterator[Record]:
    """The rows of one file, in their order.

    Raises: NotFound; DataError if the content does not match the suffix. The message names the line or the byte.
    """
    with _explain_read_errors(path):
        yield from READERS[get_format(path)](path)


def get_format(path: Path) -> str:
    """The format in a file's name, such as `.jsonl`; empty if there is no reader for it."""
    suffix = Path(strip_compression(path)).suffix
    return suffix if suffix in READERS else ""


def list_files(path: Path) -> list[Path]:
    """The file itself, or all readable files below a folder, sorted. Hidden files are skipped.

    Raises: DataError if no file has a suffix that can be read.
    """
    formats = f"{', '.join(READERS)} (each also {', '.join(COMPRESSIONS)})"
    if path.is_file():
        if command := find_unpack_command(path):
            raise DataError(f"{path} is an archive; unpack it with `{command}`, and give the folder")
        if not get_format(path):
            raise DataError(f"{path} is none of {formats}; convert it, or give it the suffix of its format")
        return [path]
    with _explain_read_errors(path):
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
    readable_files = [file for file in files if get_format(file) and not _is_saved_metadata(file)]
    if not readable_files:
        commands = [command for file in files if (command := find_unpack_command(file))]
        remedy = f"; unpack its archive with `{commands[0]}`" if commands else ""
        raise DataError(f"the folder {path} holds {len(files)} files and none of {formats}{remedy}")
    return readable_files


def _is_saved_metadata(path: Path) -> bool:
    """Whether a file of `save_to_disk` is none of its data."""
    is_saved = any((path.parent / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return is_saved and (path.name in SAVED_FILES or bool(CACHE_PATTERN.fullmatch(path.name)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def assign_splits(names: list[str]) -> tuple[list[int], list[int]] | None:
    """(train, validation): the indices of the files or splits of each, by their names; None if no name says so.

    Those named `validation`, `valid`, `val`, `dev` or `eval` are held out. Without them, those named `test` are;
    otherwise `test` belongs to neither. Trained on are those named `train`, or without them all that are not held out.
    The list of validation is empty if no name matches.
    """
    validation = [i for i, name in enumerate(names) if VALIDATION_PATTERN.search(name)]
    test = [i for i, name in enumerate(names) if TEST_PATTERN.search(name)]
    named_train = [i for i, name in enumerate(names) if TRAIN_PATTERN.search(name)]
    train = named_train or [i for i in range(len(names)) if i not in {*validation, *test}]
    if not train or (len(train) == len(names) and not named_train):
        return None
    return train, [i for i in validation or test if i not in train]


def get_names(path: Path, files: Sequence[Path]) -> list[str]:
    """The names of files, below the folder `path` if it is one."""
    return [file.name if path.is_file() else str(file.relative_to(path)) for file in files]


def has_named_splits(path: Path) -> bool:
    """Whether a folder holds files whose names say what is trained on and what is held out.

    Raises: DataError if it holds no file that can be read.
    """
    return path.is_dir() and assign_splits(get_names(path, list_files(path))) is not None


def is_held_out(name: str) -> bool:
    """Whether the name of a file or split says that it is not to be trained on."""
    return bool(VALIDATION_PATTERN.search(name) or TEST_PATTERN.search(name))


def find_license(path: Path) -> str | None:
    """The name and first line of the LICENSE file in the same folder; None if there is none."""
    folder = path if path.is_dir() else path.parent
    for file in sorted(folder.glob("LICEN[CS]E*")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        title = next((line.strip() for line in lines if line.strip()), "")
        if title:
            return f"{file.name}: {title}"
    return None


@contextmanager
def _explain_read_errors(path: Path) -> Iterator[None]:
    """Turns errors of reading `path` into a DataError or NotFound of one sentence."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: permission denied") from error
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except DAMAGE_ERRORS as error:
        kind = "gzip" if path.suffix.lower() == ".gz" else path.suffix.lower()
        raise DataError(f"{path} is not a complete {kind} file ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their line ends, without a byte order mark."""
    offset = 0
    with open_file(path) as file:
        for raw in file:
            yield _decode(raw, path, offset).removeprefix(BOM if offset == 0 else "")
            offset += len(raw)


def _decode(raw: bytes, path: Path, offset: int = 0) -> str:
    if b"\0" in raw:
        raise DataError(f"{path} is binary, not text: a zero byte at offset {offset + raw.index(0)}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset + error.start}; convert it to UTF-8"
        ) from error


def _read_text(path: Path) -> Iterator[Record]:
    text = "".join(_read_lines(path)).replace("\r\n", "\n")
    yield Record({"text": text}, str(path))


def _read_json_lines(path: Path, *, number: int = 0) -> Iterator[Record]:
    lines = iter(_read_lines(path))
    for line in lines:
        number += 1
        if number == 1 and line.lstrip().startswith("[") and not _is_json_lines(line):
            yield from _read_json_list(line + "".join(lines), path)
        elif number == 1 and line.lstrip().startswith("["):
            yield from _read_list_lines(line, lines, path)
        elif line.strip():
            yield _make_record(_parse_json(line.rstrip(), path, first_line=number), f"{path}, line {number}")


def _read_list_lines(line: str, lines: Iterator[str], path: Path) -> Iterator[Record]:
    """The rows of a file whose first line is a list: the only row, all rows, or the first of a list in each line."""
    remaining_lines = [(number, text) for number, text in enumerate(lines, start=2) if text.strip()]
    if not remaining_lines:
        yield from _read_json_list(line, path)
    for number, text in [(1, line), *remaining_lines] if remaining_lines else []:
        yield _make_record(_parse_json(text.rstrip(), path, first_line=number), f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[Record]:
    text = "".join(_read_lines(path))
    if text.lstrip().startswith("{") and "\n" in text.strip() and _is_json_lines(text):
        yield from _read_json_lines(path)
    elif text.strip():
        yield from _read_json_list(text, path)


def _is_json_lines(text: str) -> bool:
    """Whether the first line is a complete JSON value, as in JSON lines with the suffix `.json`."""
    try:
        json.loads(text.lstrip().split("\n", 1)[0])
    except ValueError:
        return False
    return True


def _read_json_list(text: str, path: Path) -> Iterator[Record]:
    value = _parse_json(text, path)
    if isinstance(value, dict) and isinstance(value.get("data"), list):  # as SQuAD's
        value = value["data"]
    is_single = not isinstance(value, list) or _is_chat(value)
    for number, row in enumerate([value] if is_single else value, start=1):
        yield _make_record(row, f"{path}, row {number}")


def _parse_json(text: str, path: Path, *, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}, line {line} is not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{path}, line {first_line} is nested too deeply for JSON") from error


def _is_chat(value: Any) -> bool:
    """Whether a JSON value is a list of turns."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(
        isinstance(turn, dict) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))
        for turn in value
    )


def _make_record(value: Any, location: str) -> Record:
    if _is_chat(value):
        return Record({"messages": value}, location)
    if not isinstance(value, dict):
        raise DataError(
            f"{location} is a {type(value).__name__}; every row must be an object with named fields, or a list of turns"
        )
    return Record(value, location)


def _read_separated(path: Path, dialect: type[csv.Dialect]) -> Iterator[Record]:
    reader = csv.reader(_read_lines(path), dialect, strict=True)
    with _allow_long_fields():
        try:
            header = next(reader, None)
            for fields in reader:
                if fields:
                    yield _make_field_record(header or [], fields, f"{path}, line {reader.line_num}")
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num} is not valid CSV: {error}") from error


def _make_field_record(header: list[str], fields: list[str], location: str) -> Record:
    if len(fields) != len(header):
        raise DataError(f"{location} has {len(fields)} fields where the header has {len(header)}")
    return Record(dict(zip(header, fields, strict=True)), location)


@contextmanager
def _allow_long_fields() -> Iterator[None]:
    """Raises the global limit of the csv module, which refuses fields over 128 KiB."""
    previous_limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(previous_limit)


class _TabDialect(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with open_file(path) as file, _explain_arrow_errors(path, "Parquet"):
        table = pq.ParquetFile(path if strip_compression(path) == path.name.lower() else io.BytesIO(file.read()))
        yield from _number_rows(table.iter_batches(batch_size=1024), path)


def _read_arrow(path: Path) -> Iterator[Record]:
    import pyarrow as pa

    with open_file(path) as file, _explain_arrow_errors(path, "Arrow"):
        source = pa.memory_map(str(path)) if strip_compression(path) == path.name.lower() else io.BytesIO(file.read())
        try:
            reader = pa.ipc.open_stream(source)  # as `datasets` writes it
            batches = iter(reader)
        except pa.ArrowInvalid:
            source.seek(0)
            file_reader = pa.ipc.open_file(source)
            batches = (file_reader.get_batch(i) for i in range(file_reader.num_record_batches))
        yield from _number_rows(batches, path)


def _number_rows(batches: Iterable[Any], path: Path) -> Iterator[Record]:
    rows = (row for batch in batches for row in batch.to_pylist())
    return (Record(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1))


@contextmanager
def _explain_arrow_errors(path: Path, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path} is not a complete {kind} file: {get_first_line(error)}") from error


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": lambda path: _read_separated(path, csv.excel),
    ".tsv": lambda path: _read_separated(path, _TabDialect),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
