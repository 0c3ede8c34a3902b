"""Files as rows: text, JSON, JSON lines, CSV, TSV and Parquet, each also gzipped, and folders of them.

A `.txt` file is one row with the column `text`. A `.csv` file has a header and the usual quotes; a `.tsv` file has a
header too, but quotes in it are plain characters and no field holds a line break, as the media type
text/tab-separated-values has it. Text is UTF-8; anything else is refused with the byte at which it stops being so.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from potstill.core.errors import DataError, NotFound

BOM = "\ufeff"
TRAIN = re.compile(r"(^|[-_./])train([-_./]|$)", re.IGNORECASE)
VALIDATION = re.compile(r"(^|[-_./])(validation|valid|val|dev)([-_./]|$)", re.IGNORECASE)
TEST = re.compile(r"(^|[-_./])test([-_./]|$)", re.IGNORECASE)


class Record(NamedTuple):
    """One row of a file, and where it stands there: `train.jsonl, line 7`."""

    row: Mapping[str, Any]
    where: str


def records(path: Path) -> Iterator[Record]:
    """The rows of one file, in its order.

    Raises: DataError where it cannot be read as what its name says; the message names the line or the byte.
    """
    with _readable(path):
        yield from READERS[format_of(path)](path)


def format_of(path: Path) -> str:
    """The format that a file's name states, as `.jsonl`; empty where it is none that can be read."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in READERS else ""


def files_of(path: Path) -> list[Path]:
    """The file itself, or all readable files below a folder, sorted; hidden ones are passed over.

    Raises: DataError where none of them can be read by its name.
    """
    accepted = ", ".join(READERS)
    if path.is_file():
        if not format_of(path):
            raise DataError(f"{path} is none of {accepted} (each also .gz); convert it, or rename it to what it is")
        return [path]
    with _readable(path):
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    found = [file for file in inside if format_of(file)]
    if not found:
        raise DataError(f"the folder {path} holds {len(inside)} files and none of {accepted} (each also .gz)")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def held_out(names: list[str]) -> tuple[list[int], list[int]] | None:
    """(train, validation): which of these files or splits are which, as numbers; None where the names do not say.

    They say so if one is named `train`. What is named `validation`, `valid`, `val` or `dev` is then held out, else what
    is named `test`; where both are there, `test` belongs to neither. The list of validation is empty if none is named.
    """
    train = [i for i, name in enumerate(names) if TRAIN.search(name)]
    if not train:
        return None
    rest = [i for i in range(len(names)) if i not in train]
    validation = [i for i in rest if VALIDATION.search(names[i])]
    return train, validation or [i for i in rest if TEST.search(names[i])]


def licence_beside(path: Path) -> str | None:
    """The first line of the LICENSE file in the same folder, with its name; None where there is none."""
    folder = path if path.is_dir() else path.parent
    for file in sorted(folder.glob("LICEN[CS]E*")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        title = next((line.strip() for line in lines if line.strip()), "")
        if title:
            return f"{file.name}: {title}"
    return None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says in one sentence why a file cannot be read."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{path} may not be read: permission denied") from error
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, without a byte order mark."""
    offset = 0
    with _open(path) as file:
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


def _text(path: Path) -> Iterator[Record]:
    text = "".join(_lines(path)).replace("\r\n", "\n")
    yield Record({"text": text}, str(path))


def _json_lines(path: Path, *, number: int = 0) -> Iterator[Record]:
    lines = iter(_lines(path))
    for line in lines:
        number += 1
        if number == 1 and line.lstrip().startswith("["):
            yield from _json_list(line + "".join(lines), path)
        elif line.strip():
            yield _row(_parse(line.rstrip(), path, first_line=number), f"{path}, line {number}")


def _json(path: Path) -> Iterator[Record]:
    text = "".join(_lines(path))
    if text.lstrip().startswith("{") and _whole_line(text):
        yield from _json_lines(path)
    elif text.strip():
        yield from _json_list(text, path)


def _whole_line(text: str) -> bool:
    """Whether the first line is a JSON value of its own, as in JSON lines that go by the name of `.json`."""
    try:
        json.loads(text.lstrip().split("\n", 1)[0])
    except ValueError:
        return False
    return True


def _json_list(text: str, path: Path) -> Iterator[Record]:
    value = _parse(text, path)
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _row(row, f"{path}, row {number}")


def _parse(text: str, path: Path, *, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}, line {line} is no valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{path}, line {first_line} is nested too deeply to be read as JSON") from error


def _row(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}; every row has to be an object with named fields")
    return Record(value, where)


def _separated(path: Path, dialect: type[csv.Dialect]) -> Iterator[Record]:
    reader = csv.reader(_lines(path), dialect, strict=True)
    with _long_fields():
        try:
            header = next(reader, None)
            for fields in reader:
                if fields:
                    yield _fields(header or [], fields, f"{path}, line {reader.line_num}")
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num} is no valid CSV: {error}") from error


def _fields(header: list[str], fields: list[str], where: str) -> Record:
    if len(fields) != len(header):
        raise DataError(f"{where} has {len(fields)} fields where the header has {len(header)}")
    return Record(dict(zip(header, fields, strict=True)), where)


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module refuses fields over 128 KiB unless its one global limit is raised."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class _Tabs(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(path) as file:
            table = pq.ParquetFile(io.BytesIO(file.read()) if path.name.lower().endswith(".gz") else path)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Record(row, f"{path}, row {number}")
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path} is no whole Parquet file: {str(error).splitlines()[0]}") from error


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": lambda path: _separated(path, csv.excel),
    ".tsv": lambda path: _separated(path, _Tabs),
    ".parquet": _parquet,
}
