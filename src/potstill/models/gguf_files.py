"""The files of a GGUF model: recognized by suffix or first bytes, whole or split into parts."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.core.errors import ArtifactError

MAGIC = b"GGUF"  # Ollama names its files by their digest, without a suffix
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)


def is_gguf_file(path: Path) -> bool:
    """Whether a file has the suffix or the first bytes of a GGUF file."""
    if path.suffix.lower() == ".gguf":
        return True
    if not os.access(path, os.R_OK):
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def find_gguf_file(path: Path) -> Path:
    """The first part of a split file, whichever part `path` is; `path` itself if it is whole."""
    part = PART.fullmatch(path.name)
    return path.with_name(f"{part['stem']}-00001-of-{part['count']}{part['suffix']}") if part else path


def find_gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a folder; a split one counts once."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return []
    candidates = (file for file in folder.iterdir() if file.suffix.lower() == ".gguf" or file.name.startswith("sha256"))
    return sorted({find_gguf_file(file) for file in candidates if file.is_file() and is_gguf_file(file)})


def list_parts(path: Path) -> list[Path]:
    """The files of the GGUF model at `path`, in order; one unless it is split.

    Raises: ArtifactError if a part is missing.
    """
    part = PART.fullmatch(path.name)
    if part is None:
        return [path]
    numbers = range(1, int(part["count"]) + 1)
    parts = [path.with_name(f"{part['stem']}-{n:05}-of-{part['count']}{part['suffix']}") for n in numbers]
    if missing := [file.name for file in parts if not file.is_file()]:
        raise ArtifactError(f"{path} is one of {len(parts)} parts, and {missing[0]} is not beside it; download it too")
    return parts


@contextlib.contextmanager
def merge_parts(path: Path) -> Iterator[Path]:
    """The GGUF model at `path` in one file; parts are merged in a temporary folder, which is deleted afterwards.

    Raises: ArtifactError if a part is missing or damaged, or the temporary folder has no room.
    """
    parts = list_parts(path)
    if len(parts) == 1:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
        whole = Path(folder) / "merged.gguf"
        try:
            _merge(parts, whole)
        except (ValueError, OSError, IndexError) as error:
            raise ArtifactError(
                f"the {len(parts)} parts of {path} cannot be merged in {folder} ({error}); download them again, free "
                f"some space, or merge them yourself: llama-gguf-split --merge {path.name} merged.gguf"
            ) from error
        yield whole


def _merge(parts: list[Path], whole: Path) -> None:
    """Write `whole`: the metadata of the first part, and the tensors of all."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys

    readers = [GGUFReader(part) for part in parts]
    fields = readers[0].fields
    writer = GGUFWriter(whole, fields[Keys.General.ARCHITECTURE].contents(), endianess=readers[0].endianess)
    for name, field in fields.items():
        if name == Keys.General.ARCHITECTURE or name.startswith(("GGUF.", "split.")):
            continue
        kind: Any = field.types[0]
        item_kind = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=item_kind)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=readers[0].endianess)
    writer.close()


def read_metadata(path: Path) -> dict[str, Any]:
    """The `general.*` fields of a GGUF file (name, license, languages, quantization).

    Raises: ArtifactError if the file is no GGUF file or is truncated.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (ValueError, OSError, IndexError) as error:
        raise ArtifactError(
            f"{path} is not a readable GGUF file ({get_first_sentence(error)}); download or convert it again"
        ) from error
    return {
        name.removeprefix("general."): field.contents() for name, field in fields.items() if name.startswith("general.")
    }


def get_first_sentence(error: BaseException) -> str:
    """The first sentence of a library's error, at most 200 characters."""
    return re.split(r"\n|\. ", str(error), maxsplit=1)[0][:200]
