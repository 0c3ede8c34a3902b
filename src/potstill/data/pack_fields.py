"""What a pack may hold beside tokens, labels and lengths: fields that are declared per token or per document.

    SCORE = declare_field(PackField("score", per="document", dtype="float32", fill=0.0))
    rows = [TokenizedDocument(ids, labels, {"score": 0.5}), ...]
    collate([pack(rows, length=512)[0]])["score"]  # [documents]

A declared field goes with its documents from `TokenizedDocument` through `TokenDataset`, `Packs`, `collate`, rollouts
and replay. An objective reads it from the batch. Fields of documents are read by the number of a document:
`batch["score"][batch["documents"]]`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from potstill.core.errors import DataError, UsageError
from potstill.core.types import ADVANTAGES, IGNORE, OLD_LOG_P, ROWS, SAMPLING_LOG_P
from potstill.ops.layout import DOCUMENT_KEYS, PADDING

RESERVED_NAMES = ("input_ids", "labels", "lengths", "position_ids", "documents", "sampled", "asked", "facts")


@dataclass(frozen=True)
class PackField:
    """A named value per token or per document. A batch holds it as `[B T]` or as `[documents]`, integers as int64.

    `fill` is the value of documents without the field, of padding, and of tokens that a model samples. A `repeated`
    field of documents is `[B T]` in a batch: every token holds the value of its document. A `target` marks what is
    trained: each value is used once, so the context of a further window holds `fill`, and a window with a target is
    kept. A `numbering` field holds numbers from 0 that are unique in a batch; `collate` renumbers them by an offset.

    Raises: UsageError for a name that a batch uses otherwise, or a dtype other than int32, float32 and bool.
    """

    name: str
    per: Literal["token", "document"]
    dtype: str = "int32"
    fill: int | float = 0
    repeated: bool = False
    target: bool = False
    numbering: bool = False

    def __post_init__(self) -> None:
        if self.name in RESERVED_NAMES or not self.name.isidentifier():
            raise UsageError(f"a field of packs cannot be called {self.name!r}; a batch uses that name otherwise")
        if self.per not in ("token", "document") or self.dtype not in ("int32", "float32", "bool"):
            raise UsageError(f"the field {self.name!r} is {self.dtype} per {self.per}; see PackField for the choices")
        if (self.per == "token" and (self.repeated or self.numbering)) or (self.per == "document" and self.target):
            raise UsageError(f"the field {self.name!r} is per {self.per}; see PackField for what it may be")


_FIELDS: dict[str, PackField] = {}


def declare_field(field: PackField) -> PackField:
    """Declares a field for all packs of this process, and returns it.

    Raises: UsageError where another field has its name.
    """
    if _FIELDS.setdefault(field.name, field) != field:
        raise UsageError(f"there is another field of packs called {field.name!r}; choose another name")
    if field.per == "token" or field.repeated:
        PADDING[field.name] = field.fill
    if field.repeated:
        DOCUMENT_KEYS.add(field.name)
    return field


def list_fields() -> list[PackField]:
    """All declared fields, by name."""
    return [_FIELDS[name] for name in sorted(_FIELDS)]


def get_field(name: str) -> PackField:
    """The declaration of a field.

    Raises: UsageError where nothing of this name is declared.
    """
    if name not in _FIELDS:
        raise UsageError(f"no field of packs called {name!r} is declared; declare it with declare_field")
    return _FIELDS[name]


ROUTES = declare_field(PackField("routes", per="document", fill=-1, repeated=True))  # which teacher a document is for
LANGUAGES = declare_field(PackField("languages", per="document", fill=-1, repeated=True))  # core.language; -1: unknown
GROUPS = declare_field(PackField("groups", per="document", fill=-1, numbering=True))  # -1: no group
SIDES = declare_field(PackField("sides", per="document", fill=-1))  # core.types.CHOSEN, ...; -1: a prompt, other text
OFFSETS = declare_field(PackField("offsets", per="document"))  # of a document's first position; above 0: continuation
ROW_NUMBERS = declare_field(PackField(ROWS, per="document", fill=-1))  # of a prompt in its data set; -1: none
for name in (SAMPLING_LOG_P, OLD_LOG_P):
    declare_field(PackField(name, per="token", dtype="float32"))
declare_field(PackField(ADVANTAGES, per="document", dtype="float32"))
TARGETS = declare_field(PackField("targets", per="token", fill=IGNORE, target=True))  # the target at this position

LABEL_FIELDS = {"route": ROUTES.name, "language": LANGUAGES.name}  # the field of each number that a row's column gives


def to_array(name: str, value: Any, length: int) -> np.ndarray:
    """The value of one document as an array: `[length]` for a field of tokens, else `[]`.

    Raises: DataError where the number of values is not that of the tokens; UsageError for an undeclared name.
    """
    field = get_field(name)
    array = np.asarray(value, dtype=field.dtype)
    expected_shape = (length,) if field.per == "token" else ()
    if array.shape != expected_shape:
        raise DataError(
            f"the field {name!r} is per {field.per}, and holds {array.size} values for a document of {length} tokens"
        )
    return array


def join_fields(documents: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """The fields of documents of these lengths, end to end: `[tokens]` or `[documents]` each, by name.

    A document without a field that another one has gets its fill value.
    """
    joined = {}
    for name in sorted({name for fields in documents for name in fields}):
        field = get_field(name)
        arrays = [
            to_array(name, fields[name], length)
            if name in fields
            else np.full(length if field.per == "token" else (), field.fill, dtype=field.dtype)
            for fields, length in zip(documents, lengths, strict=True)
        ]
        joined[name] = np.concatenate(arrays) if field.per == "token" else np.stack(arrays)
    return joined


def slice_fields(fields: Mapping[str, np.ndarray], tokens: slice, documents: slice) -> dict[str, np.ndarray]:
    """The part of joined fields that belongs to these tokens and documents."""
    return {name: values[tokens if get_field(name).per == "token" else documents] for name, values in fields.items()}


def to_tensor(values: np.ndarray) -> Tensor:
    """An array as a tensor of its own memory, integers as int64."""
    return torch.from_numpy(values.astype(np.int64) if values.dtype == np.int32 else values.copy())


def collate_fields(
    packs: Sequence[Mapping[str, Tensor]], documents: Tensor, lengths: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The declared fields of packs as a batch holds them: per token `[1 T]`, per document `[documents]`.

    `documents [T]` is the number of the document of each token, `lengths` the documents' lengths in each pack.
    """
    batch = {}
    for field in list_fields():
        if not any(field.name in pack for pack in packs):
            continue
        parts = [
            torch.as_tensor(pack[field.name])
            if field.name in pack
            else to_tensor(np.full(int(sizes.sum()) if field.per == "token" else len(sizes), field.fill, field.dtype))
            for pack, sizes in zip(packs, lengths, strict=True)
        ]
        values = torch.cat(_renumber(parts) if field.numbering else parts)
        if field.repeated:
            values = values[documents]
        batch[field.name] = values[None] if field.per == "token" or field.repeated else values
    return batch


def _renumber(parts: Sequence[Tensor]) -> list[Tensor]:
    """The numbers of each pack counted on from those of the packs before it, in their order; -1 stays."""
    renumbered, offset = [], 0
    for part in parts:
        part = part.long()
        numbers, indices = torch.unique(part[part >= 0], return_inverse=True)
        renumbered.append(part.masked_scatter(part >= 0, indices + offset))
        offset += len(numbers)
    return renumbered


def split_fields(batch: Mapping[str, Tensor], lengths: Sequence[int]) -> list[dict[str, Tensor]]:
    """The declared fields of each document of a packed batch, on the CPU: `[length]` per token, `[]` per document."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    joined = {}
    for field in list_fields():
        if field.name in batch:
            values = batch[field.name].cpu()
            values = values[0] if field.per == "token" or field.repeated else values
            joined[field.name] = values[starts] if field.repeated else values
    return split_joined_fields(joined, lengths)


def split_joined_fields(fields: Mapping[str, Tensor], lengths: Sequence[int]) -> list[dict[str, Tensor]]:
    """The declared fields among `fields`, `[tokens]` or `[documents]`, of each document of these lengths."""
    documents: list[dict[str, Tensor]] = [{} for _ in lengths]
    for field in list_fields():
        if field.name in fields:
            values = fields[field.name]
            parts = values.split(list(lengths)) if field.per == "token" else values.unbind()
            for document, value in zip(documents, parts, strict=True):
                document[field.name] = value
    return documents
