"""Opens files that are compressed by one program, and names those that must be unpacked or fetched first."""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import cast

from potstill.core.errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DAMAGE_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)
UNPACK_COMMANDS = {
    ".zip": "unzip",
    ".tar": "tar -xf",
    ".tgz": "tar -xf",
    ".7z": "7z x",
    ".rar": "unrar x",
    ".lz4": "lz4 -d",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ANNEX_POINTER = b"/annex/objects/"


def strip_compression(path: Path) -> str:
    """The file's name in small letters, without the suffix of a compression."""
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSIONS if name.endswith(suffix)), name)


def open_file(path: Path) -> io.BufferedIOBase:
    """The file's content, uncompressed.

    Raises: DataError for a pointer of Git LFS or git-annex, and for a file that is not compressed as its suffix says.
    """
    check_no_pointer(path)
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            return _open_zstandard(path)
    return path.open("rb")


def _open_zstandard(path: Path) -> io.BufferedIOBase:
    import pyarrow as pa

    stream = pa.input_stream(str(path), compression="zstd")
    return cast(io.BufferedIOBase, io.BufferedReader(stream))  # which reads line by line


def check_no_pointer(path: Path) -> None:
    """Raises: DataError if the file only says where its content is, because its repository was cloned without it."""
    with path.open("rb") as file:
        beginning = file.read(64)
    if beginning.startswith(LFS_POINTER):
        raise DataError(f"{path} is a Git LFS pointer and not the data; run `git lfs pull` in its repository")
    if beginning.startswith(ANNEX_POINTER):
        raise DataError(f"{path} is a git-annex pointer and not the data; run `git annex get` in its repository")


def find_unpack_command(path: Path) -> str | None:
    """The command that unpacks an archive, which cannot be read as it is; None for any other file."""
    suffix = ".tar" if Path(strip_compression(path)).suffix == ".tar" else path.suffix.lower()
    return f"{UNPACK_COMMANDS[suffix]} {path.name}" if suffix in UNPACK_COMMANDS else None
