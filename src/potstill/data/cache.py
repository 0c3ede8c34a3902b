"""A teacher's cache: what it said about a text, on disk, for any number of students.

    DIR/manifest.json        what the cache was made from and of; the names and SHA-256 of everything else
    DIR/classes.safetensors  `classes` uint8 [V], the class of every token
    DIR/shard-00000.safetensors ...

A shard holds windows (documents, or the windows of a long one) end to end: the arrays of `codes.py`, and for each
window its `keys` uint64, and where its rows, its ids and its record end (`row_ends`, `id_ends`, `record_ends`, int64).
A key is the first eight bytes of the BLAKE2b hash of the window's tokens and of which of them are trained, so a window
is found whatever its place, and another text, mask or tokenizer finds nothing. With hidden states kept, `hidden` is
bfloat16 [N D] (as uint16), the last ones, after the final norm.

Shards are memory-mapped: only what a batch asks for is read.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from potstill.core.artefact import CARD, hash_file
from potstill.core.errors import ArtefactError, CacheMismatch, NotFound, UnsupportedModel, UsageError
from potstill.core.types import IGNORE, Batch, Head, Needs, Signals
from potstill.data.codes import Format, decode
from potstill.ops.coarse import Coarse, joined
from potstill.ops.layout import through

MANIFEST, CLASSES = "manifest.json", "classes.safetensors"
PROGRESS = "capture.json"  # while capturing: the run's identity, and the shards that are whole
KIND, VERSION = "potstill teacher cache", 3


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a cache was made from; each must be the same again where it is used. Digests are SHA-256."""

    teacher: str
    config: str
    dtype: str
    tokenizer: str
    template: str
    text: str
    context: int
    temperature: float
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest as a value. `kept` is `top-k` or `sampled`; `files` maps names to SHA-256."""

    facts: Facts
    names: Mapping[str, str]
    kept: str
    top_k: int
    mass: float
    classes: int
    exact: bool
    hidden: bool
    rows: int
    windows: int
    ids: int
    bytes: int
    seed: int
    files: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        return {"kind": KIND, "version": VERSION, **asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a cache.

        Raises: NotFound, ArtefactError.
        """
        found = _manifest(folder)
        if (version := found.pop("version")) != VERSION:
            raise ArtefactError(
                f"{folder} is a cache of version {version}, and this potstill reads {VERSION}; make it again"
            )
        try:
            return cls(**{**found, "facts": Facts(**found["facts"])})
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"{folder / MANIFEST} cannot be read ({error}); make the cache again") from error

    @property
    def drawn(self) -> bool:
        """Whether rows are samples, of which only the average is the teacher."""
        return self.kept == "sampled"

    @property
    def format(self) -> Format:
        """How its rows are coded."""
        return Format(self.facts.vocabulary, self.classes, self.exact)


def key_of(ids: np.ndarray, labels: np.ndarray) -> int:
    """What a window of tokens is found by."""
    trained = np.packbits(labels != IGNORE)
    said = np.ascontiguousarray(ids, dtype="<i4").tobytes() + trained.tobytes()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")


def windows_of(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids and labels of each document of a packed batch."""
    assert len(batch["input_ids"]) == 1, "documents of one packed row"
    lengths = torch.unique_consecutive(batch["documents"][0].cpu(), return_counts=True)[1]
    inside = np.cumsum(lengths.numpy())[:-1]
    return list(zip(*(np.split(batch[name][0].cpu().numpy(), inside) for name in ("input_ids", "labels")), strict=True))


@dataclass(frozen=True)
class _Place:
    """Where a window lies: its shard, and its rows, ids and record there."""

    shard: int
    rows: slice
    ids: slice
    record: slice


class Cache:
    """A teacher that answers from a cache, as a live one would.

    Raises: NotFound, ArtefactError for a folder that is no whole cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        names = sorted(name for name in self.manifest.files if name.startswith("shard-"))
        self._shards = [self._open(name) for name in names]
        with self._open(CLASSES) as file:
            classes = torch.from_numpy(file.get_tensor("classes").astype(np.int64))
        self.members = torch.nn.functional.one_hot(classes, self.manifest.classes).float()
        self._places = {key: place for n, shard in enumerate(self._shards) for key, place in _places(n, shard)}

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="np")
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{self.folder / name} cannot be read ({error}); make the cache again") from error

    def require(self, expected: Mapping[str, Any]) -> None:
        """Refuse a use for which the cache was not made.

        Raises: CacheMismatch with the two values.
        """
        ours = asdict(self.manifest.facts)
        for name, value in expected.items():
            if ours[name] != value:
                raise CacheMismatch(
                    f"the cache {self.folder} was made with {name} {_short(ours[name])}, and this run has "
                    f"{_short(value)}; use it with what it was made from, or make another"
                )

    def holds(self, ids: np.ndarray, labels: np.ndarray) -> bool:
        """Whether this window is in the cache."""
        return key_of(ids, labels) in self._places

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """What the teacher said about a packed batch, rows as `Coarse`.

        Raises: CacheMismatch for a window that is not in the cache; UnsupportedModel for what it does not keep.
        """
        require_rows(needs)
        places, device = self._places_of(batch), batch["input_ids"].device
        known = joined([self._read(place) for place in places]) if places else self._none()
        moved = Coarse(*(part.to(device) for part in (known.ids, known.log_p, known.log_rest, known.members)))
        return Signals(rows=torch.arange(len(moved), device=device), logits=moved.at)

    def states(self, batch: Batch) -> Tensor:
        """The teacher's last hidden states [N D] of a packed batch, in bfloat16, where they were kept.

        Raises: CacheMismatch for a window that is not in the cache; UnsupportedModel where none are kept.
        """
        if not self.manifest.hidden:
            raise UnsupportedModel(f"the cache {self.folder} keeps no hidden states; capture it with --hidden")
        parts = [self._shards[place.shard].get_slice("hidden")[place.rows] for place in self._places_of(batch)]
        width = self._shards[0].get_slice("hidden").get_shape()[1]
        found = np.concatenate([np.zeros((0, width), np.uint16), *parts])
        return torch.from_numpy(found).view(torch.bfloat16).to(batch["input_ids"].device)

    def _places_of(self, batch: Batch) -> list["_Place"]:
        places = [self._find(*window) for window in windows_of(batch)]
        return [place for place in places if place.rows.stop > place.rows.start]

    def _find(self, ids: np.ndarray, labels: np.ndarray) -> _Place:
        key = key_of(ids, labels)
        if key not in self._places:
            raise CacheMismatch(
                f"a window of {len(ids)} tokens is not in the cache {self.folder}; make one of this text"
            )
        return self._places[key]

    def _read(self, place: _Place) -> Coarse:
        manifest, slices = self.manifest, {"record": place.record}
        if manifest.exact:
            rest = slice(place.rows.start * manifest.classes, place.rows.stop * manifest.classes)
            slices |= {"log_p": place.ids, "log_rest": rest}
        arrays = {name: self._shards[place.shard].get_slice(name)[part] for name, part in slices.items()}
        return decode(arrays, place.rows.stop - place.rows.start, self.members, manifest.format)

    def _none(self) -> Coarse:
        nothing = torch.zeros(0, self.manifest.classes)
        return Coarse(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), nothing, self.members)


@dataclass(frozen=True)
class Recalled:
    """A teacher of whom a cache keeps the last hidden states and whose `head` is here: all of its distributions."""

    cache: Cache
    head: Head

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """Its states at the rows of a packed batch, in the head's dtype, and the head that makes them logits.

        Raises: what `Cache.signals` does.
        """
        require_rows(needs)
        head = self.head if vocabulary is None else self.head.real(vocabulary)
        states = self.cache.states(batch).to(head.weight.dtype)
        return Signals(rows=states, logits=lambda rows: through(head.logits, rows), head=head)


def require_rows(needs: Needs) -> None:
    """Refuse to be asked for more than rows, which is all that a cache keeps.

    Raises: UnsupportedModel.
    """
    if needs.layers or needs.relations or needs.extras:
        raise UnsupportedModel("a cache keeps what a teacher says at its end, and the objective needs more; learn live")


def caches(folder: Path) -> list[Path]:
    """The caches in `folder`: itself, or those right below it.

    Raises: NotFound where there is no such folder.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}")
    return [one for one in (folder, *sorted(folder.iterdir())) if is_cache(one)]


def is_cache(folder: Path) -> bool:
    """Whether this folder is a cache; those of checkpoints and web pages have a manifest too."""
    file = folder / MANIFEST
    return file.is_file() and KIND in file.read_text(encoding="utf-8", errors="replace")


def remove(folder: Path) -> int:
    """Remove the cache `folder`; how many bytes that freed.

    Raises: NotFound, ArtefactError where it is no cache; UsageError where it holds files that are not the cache's.
    """
    files = {MANIFEST, CARD, PROGRESS, *_manifest(folder).get("files", ())}
    if others := sorted(one.name for one in folder.iterdir() if one.name not in files):
        raise UsageError(f"{folder} holds {others[0]}, which is no part of the cache; move it away first")
    freed = sum(one.stat().st_size for one in folder.iterdir())
    shutil.rmtree(folder)
    return freed


@dataclass(frozen=True)
class Window:
    """What a shard holds of one window: its key, the numbers of its rows and of their ids, and its arrays."""

    key: int
    rows: int
    ids: int
    arrays: Mapping[str, np.ndarray]


def laid(windows: Sequence[Window]) -> dict[str, np.ndarray]:
    """A shard: the arrays of windows end to end, their keys, and where each one's parts end."""
    sizes = np.array([(one.rows, one.ids, len(one.arrays["record"])) for one in windows], dtype=np.int64)
    found = {name: np.concatenate([one.arrays[name] for one in windows]) for name in windows[0].arrays}
    found |= dict(zip(("row_ends", "id_ends", "record_ends"), np.ascontiguousarray(sizes.cumsum(0).T), strict=True))
    return {**found, "keys": np.array([one.key for one in windows], dtype=np.uint64)}


def counted(shard: Path) -> tuple[int, int, int]:
    """Rows, windows and tokens kept in a shard."""
    with safe_open(shard, framework="np") as file:
        rows, ids = (int(file.get_tensor(name)[-1]) for name in ("row_ends", "id_ends"))
        return rows, len(file.get_tensor("keys")), ids


def _manifest(folder: Path) -> dict[str, Any]:
    """A cache's manifest, of whatever version, without its kind."""
    file = folder / MANIFEST
    if not file.is_file():
        raise NotFound(f"{folder} is no teacher cache (it has no {MANIFEST}); make one with potstill cache")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind, _ = found.pop("kind"), found["version"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ArtefactError(f"{file} cannot be read ({error}); make the cache again") from error
    if kind != KIND:
        raise ArtefactError(f"{file} is that of a {kind}, and of no teacher cache")
    return dict(found)


def faults(folder: Path) -> Iterator[str]:
    """What is wrong with the files of a cache: nothing, if it verifies.

    Raises: NotFound, ArtefactError where there is no manifest to hold them against.
    """
    for name, digest in Manifest.read(folder).files.items():
        file = folder / name
        if not file.is_file():
            yield f"{name} is missing"
        elif hash_file(file) != digest:
            yield f"{name} is altered"


def _places(number: int, shard: Any) -> Iterator[tuple[int, _Place]]:
    keys, *ends = (shard.get_tensor(name) for name in ("keys", "row_ends", "id_ends", "record_ends"))
    starts = [np.concatenate([[0], end[:-1]]) for end in ends]
    for i, key in enumerate(keys.tolist()):
        yield key, _Place(number, *(slice(int(a[i]), int(b[i])) for a, b in zip(starts, ends, strict=True)))


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
