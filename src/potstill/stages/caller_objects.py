"""Models and data sets that a Python caller holds in memory, as names that every stage takes."""

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from hashlib import file_digest, sha256
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import UsageError
from potstill.core.in_memory import register_path
from potstill.models.edit_folder import BASE_FOLDER, EditFolder, save_edits
from potstill.models.edits import get_edits
from potstill.models.load import LoadedModel, compute_digest

DataSource: TypeAlias = str | Path | Dataset | Iterable[Mapping[str, Any]]
ModelSource: TypeAlias = str | Path | LoadedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase]


@contextlib.contextmanager
def name_objects(options: Mapping[str, Any], *, models: Iterable[str], data: Iterable[str]) -> Iterator[dict[str, Any]]:
    """`options` with a name for each path, model and data set; objects lie in a temporary folder during the block.

    `models` and `data` are the options that hold models and data sets.

    Raises: UsageError for an object of another type, or without rows.
    """
    named = dict(options)
    with contextlib.ExitStack() as stack:
        for name in set(models) & set(named):
            named[name] = _name_each(named[name], _name_model, stack)
        for name in set(data) & set(named):
            named[name] = _name_each(named[name], _name_rows, stack)
        yield {name: str(value) if isinstance(value, PathLike) else value for name, value in named.items()}


def _name_each(value: Any, name_object: Any, stack: contextlib.ExitStack) -> Any:
    """The name of an object, or of each of several: a list of paths, names and objects that are not rows."""
    if value is None or isinstance(value, str | PathLike):
        return None if value is None else str(value)
    if isinstance(value, list | tuple) and value and not isinstance(value[0], Mapping | PreTrainedModel):
        return tuple(_name_each(part, name_object, stack) for part in value)
    return name_object(value, stack)


def _name_model(model: Any, stack: contextlib.ExitStack) -> str:
    if isinstance(model, LoadedModel):
        model = (model.model, model.tokenizer)
    is_pair = isinstance(model, tuple) and len(model) == 2
    if not (is_pair and isinstance(model[0], PreTrainedModel) and isinstance(model[1], PreTrainedTokenizerBase)):
        raise UsageError(f"a model cannot be a {type(model).__name__}; give a name, a path or (model, tokenizer)")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potstill-")))
    edits = get_edits(model[0])
    model_folder = folder if edits is None else folder / BASE_FOLDER
    for part in model:
        part.save_pretrained(model_folder)
    if edits is not None:
        digest = compute_digest(model_folder)
        save_edits(folder, EditFolder(base=BASE_FOLDER, digest=digest, edits=edits.edits, similarity=edits.similarity))
    return stack.enter_context(register_path(folder, _hash_files(folder)))


def _name_rows(rows: Any, stack: contextlib.ExitStack) -> str:
    if isinstance(rows, DatasetDict):
        raise UsageError(
            f"a data set has the splits {', '.join(rows)}; give one of them, such as data=dataset['train']"
        )
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potstill-")))
    if isinstance(rows, Dataset):
        file = folder / "rows.parquet"
        rows.to_parquet(file)
    else:
        file = folder / "rows.jsonl"
        _write_rows(rows, file)
    return stack.enter_context(register_path(file, _hash_files(folder)))


def _write_rows(rows: Any, file: Path) -> None:
    """Write rows as JSON lines. Raises: UsageError."""
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise UsageError(f"data cannot be a {type(rows).__name__}; give a path, a datasets.Dataset or rows as dicts")
    with file.open("w", encoding="utf-8") as stream:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise UsageError(
                    f"row {number} of the data is a {type(row).__name__}; give dicts, such as {{'text': ...}}"
                )
            stream.write(json.dumps(dict(row), ensure_ascii=False, default=str) + "\n")


def _hash_files(folder: Path) -> str:
    digest = sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            file_digest(stream, lambda: digest)
    return digest.hexdigest()
