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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from potstill.core.atomic_files import CARD_FILE, hash_file
from potstill.core.errors import ArtifactError, CacheMismatch, NotFound, UnsupportedModel, UsageError
from potstill.core.types import IGNORE, Batch, Head, Needs, Signals
from potstill.ops.coarse import CoarseDistribution, concatenate
from potstill.ops.layout import apply_padded
from potstill.teachers.cache_codec import CodecFormat, decode

MANIFEST, CLASSES = "manifest.json", "classes.safetensors"
PROGRESS = "capture.json"  # while capturing: the run's identity, and the shards that are whole
KIND, VERSION = "potstill teacher cache", 3


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
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

    facts: CacheFacts
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
    def from_folder(cls, folder: Path) -> "Manifest":
        """The manifest of a cache.

        Raises: NotFound, ArtefactError.
        """
        fields = _load_manifest(folder)
        if (version := fields.pop("version")) != VERSION:
            raise ArtifactError(
                f"{folder} is a cache of version {version}, and this potstill reads {VERSION}; make it again"
            )
        try:
            return cls(**{**fields, "facts": CacheFacts(**fields["facts"])})
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{folder / MANIFEST} cannot be read ({error}); make the cache again") from error

    @property
    def is_sampled(self) -> bool:
        """Whether rows are samples, of which only the average is the teacher."""
        return self.kept == "sampled"

    @property
    def format(self) -> CodecFormat:
        """How its rows are coded."""
        return CodecFormat(self.facts.vocabulary, self.classes, self.exact)


def hash_window(ids: np.ndarray, labels: np.ndarray) -> int:
    """What a window of tokens is found by."""
    label_mask = np.packbits(labels != IGNORE)
    data = np.ascontiguousarray(ids, dtype="<i4").tobytes() + label_mask.tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def split_documents(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids and labels of each document of a packed batch."""
    assert len(batch["input_ids"]) == 1, "documents of one packed row"
    lengths = torch.unique_consecutive(batch["documents"][0].cpu(), return_counts=True)[1]
    boundaries = np.cumsum(lengths.numpy())[:-1]
    return list(
        zip(*(np.split(batch[name][0].cpu().numpy(), boundaries) for name in ("input_ids", "labels")), strict=True)
    )


@dataclass(frozen=True)
class _WindowLocation:
    """Where a window lies: its shard, and its rows, ids and record there."""

    shard: int
    rows: slice
    ids: slice
    record: slice


class TeacherCache:
    """A teacher that answers from a cache, as a live one would.

    Raises: NotFound, ArtefactError for a folder that is no whole cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.from_folder(folder)
        names = sorted(name for name in self.manifest.files if name.startswith("shard-"))
        self._shards = [self._open_file(name) for name in names]
        with self._open_file(CLASSES) as file:
            classes = torch.from_numpy(file.get_tensor("classes").astype(np.int64))
        self.members = torch.nn.functional.one_hot(classes, self.manifest.classes).float()
        self._locations = {
            key: location
            for number, shard in enumerate(self._shards)
            for key, location in _read_locations(number, shard)
        }

    def _open_file(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="np")
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.folder / name} cannot be read ({error}); make the cache again") from error

    def check_facts(self, expected_facts: Mapping[str, Any]) -> None:
        """Refuse a use for which the cache was not made.

        Raises: CacheMismatch with the two values.
        """
        facts = asdict(self.manifest.facts)
        for name, value in expected_facts.items():
            if facts[name] != value:
                raise CacheMismatch(
                    f"the cache {self.folder} was made with {name} {_shorten_digest(facts[name])}, and this run has "
                    f"{_shorten_digest(value)}; use it with what it was made from, or make another"
                )

    def has_window(self, ids: np.ndarray, labels: np.ndarray) -> bool:
        """Whether this window is in the cache."""
        return hash_window(ids, labels) in self._locations

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """What the teacher said about a packed batch, rows as `Coarse`.

        Raises: CacheMismatch for a window that is not in the cache; UnsupportedModel for what it does not keep.
        """
        check_needs_only_rows(needs)
        locations, device = self._locate_windows(batch), batch["input_ids"].device
        coarse_rows = (
            concatenate([self._read_rows(location) for location in locations]) if locations else self._make_empty_rows()
        )
        device_rows = CoarseDistribution(
            *(
                tensor.to(device)
                for tensor in (coarse_rows.ids, coarse_rows.log_p, coarse_rows.log_rest, coarse_rows.members)
            )
        )
        return Signals(rows=torch.arange(len(device_rows), device=device), logits=device_rows.select_rows)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The teacher's last hidden states [N D] of a packed batch, in bfloat16, where they were kept.

        Raises: CacheMismatch for a window that is not in the cache; UnsupportedModel where none are kept.
        """
        if not self.manifest.hidden:
            raise UnsupportedModel(f"the cache {self.folder} keeps no hidden states; capture it with --hidden")
        parts = [
            self._shards[location.shard].get_slice("hidden")[location.rows] for location in self._locate_windows(batch)
        ]
        width = self._shards[0].get_slice("hidden").get_shape()[1]
        hidden = np.concatenate([np.zeros((0, width), np.uint16), *parts])
        return torch.from_numpy(hidden).view(torch.bfloat16).to(batch["input_ids"].device)

    def _locate_windows(self, batch: Batch) -> list["_WindowLocation"]:
        locations = [self._find_window(*window) for window in split_documents(batch)]
        return [location for location in locations if location.rows.stop > location.rows.start]

    def _find_window(self, ids: np.ndarray, labels: np.ndarray) -> _WindowLocation:
        key = hash_window(ids, labels)
        if key not in self._locations:
            raise CacheMismatch(
                f"a window of {len(ids)} tokens is not in the cache {self.folder}; make one of this text"
            )
        return self._locations[key]

    def _read_rows(self, location: _WindowLocation) -> CoarseDistribution:
        manifest, slices = self.manifest, {"record": location.record}
        if manifest.exact:
            log_rest_slice = slice(location.rows.start * manifest.classes, location.rows.stop * manifest.classes)
            slices |= {"log_p": location.ids, "log_rest": log_rest_slice}
        arrays = {name: self._shards[location.shard].get_slice(name)[part] for name, part in slices.items()}
        return decode(arrays, location.rows.stop - location.rows.start, self.members, manifest.format)

    def _make_empty_rows(self) -> CoarseDistribution:
        log_rest = torch.zeros(0, self.manifest.classes)
        return CoarseDistribution(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), log_rest, self.members)


@dataclass(frozen=True)
class CachedHiddenStates:
    """A teacher of whom a cache keeps the last hidden states and whose `head` is here: all of its distributions."""

    cache: TeacherCache
    head: Head

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """Its states at the rows of a packed batch, in the head's dtype, and the head that makes them logits.

        Raises: what `Cache.signals` does.
        """
        check_needs_only_rows(needs)
        head = self.head if vocabulary is None else self.head.crop_vocabulary(vocabulary)
        states = self.cache.hidden_states(batch).to(head.weight.dtype)
        return Signals(rows=states, logits=lambda rows: apply_padded(head.logits, rows), head=head)


def check_needs_only_rows(needs: Needs) -> None:
    """Refuse to be asked for more than rows, which is all that a cache keeps.

    Raises: UnsupportedModel.
    """
    if needs.layers or needs.relations or needs.extras:
        raise UnsupportedModel("a cache keeps what a teacher says at its end, and the objective needs more; learn live")


def list_caches(folder: Path) -> list[Path]:
    """The caches in `folder`: itself, or those right below it.

    Raises: NotFound where there is no such folder.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}")
    return [path for path in (folder, *sorted(folder.iterdir())) if is_cache(path)]


def is_cache(folder: Path) -> bool:
    """Whether this folder is a cache; those of checkpoints and web pages have a manifest too."""
    file = folder / MANIFEST
    return file.is_file() and KIND in file.read_text(encoding="utf-8", errors="replace")


def remove_cache(folder: Path) -> int:
    """Remove the cache `folder`; how many bytes that freed.

    Raises: NotFound, ArtefactError where it is no cache; UsageError where it holds files that are not the cache's.
    """
    files = {MANIFEST, CARD_FILE, PROGRESS, *_load_manifest(folder).get("files", ())}
    if unknown_names := sorted(path.name for path in folder.iterdir() if path.name not in files):
        raise UsageError(f"{folder} holds {unknown_names[0]}, which is no part of the cache; move it away first")
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    return num_bytes


def _load_manifest(folder: Path) -> dict[str, Any]:
    """A cache's manifest, of whatever version, without its kind."""
    file = folder / MANIFEST
    if not file.is_file():
        raise NotFound(f"{folder} is no teacher cache (it has no {MANIFEST}); make one with potstill cache")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        kind, _ = manifest.pop("kind"), manifest["version"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); make the cache again") from error
    if kind != KIND:
        raise ArtifactError(f"{file} is that of a {kind}, and of no teacher cache")
    return dict(manifest)


def find_faults(folder: Path) -> Iterator[str]:
    """What is wrong with the files of a cache: nothing, if it verifies.

    Raises: NotFound, ArtefactError where there is no manifest to hold them against.
    """
    for name, digest in Manifest.from_folder(folder).files.items():
        file = folder / name
        if not file.is_file():
            yield f"{name} is missing"
        elif hash_file(file) != digest:
            yield f"{name} is altered"


def _read_locations(number: int, shard: Any) -> Iterator[tuple[int, _WindowLocation]]:
    keys, *ends = (shard.get_tensor(name) for name in ("keys", "row_ends", "id_ends", "record_ends"))
    starts = [np.concatenate([[0], end[:-1]]) for end in ends]
    for i, key in enumerate(keys.tolist()):
        yield key, _WindowLocation(number, *(slice(int(a[i]), int(b[i])) for a, b in zip(starts, ends, strict=True)))


def _shorten_digest(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
