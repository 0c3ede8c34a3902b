"""A teacher's cache on disk: its distributions for every window of a data set.

    DIR/manifest.json        the sources and options of the cache, and the SHA-256 of all other files
    DIR/classes.safetensors  `classes` uint8 [V], the class of every token
    DIR/shard-00000.safetensors ...

A shard holds windows (documents, or the windows of a long one) end to end: the arrays of `cache_codec`, and for each
window its key (`keys` uint64) and the ends of its rows, ids and record (`row_ends`, `id_ends`, `record_ends`, int64).
A key is the first eight bytes of the BLAKE2b hash of the window's tokens and label mask. So a window is found wherever
it is packed, and another text, mask or tokenizer finds nothing. The window of a continuation (`core.types`) holds its
prompt, so it is found whether or not the prompt is shared. With hidden states, `hidden` is bfloat16 [N D] (as
uint16), the last ones after the final norm.

Shards are memory-mapped, so only the rows of a batch are read. `cache_writer` writes them.
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
from potstill.core.types import IGNORE, Batch, Needs, Signals, select_supervised_rows
from potstill.ops.coarse import CoarseDistribution, concatenate
from potstill.ops.layout import repeat_prompts
from potstill.teachers.cache_codec import CodecFormat, decode

MANIFEST, CLASSES = "manifest.json", "classes.safetensors"
PROGRESS = "capture.json"  # while the cache is written: the run's identity, and the finished shards
KIND, VERSION = "potstill teacher cache", 3
LOG_PROBS = "log-probabilities"


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """The sources of a cache. A run that uses the cache must have the same. Digests are SHA-256."""

    teacher: str
    config: str
    dtype: str
    tokenizer: str
    template: str
    text: str
    context: int
    temperature: float
    vocabulary: int
    date: str = ""  # that the chat template writes; empty if it writes none


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a cache. `kept` is `top-k`, `sampled` or `LOG_PROBS`; `files` maps names to SHA-256."""

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
        """Reads the manifest of a cache.

        Raises: NotFound, ArtifactError.
        """
        fields = _load_manifest(folder)
        if (version := fields.pop("version")) != VERSION:
            raise ArtifactError(
                f"{folder} is a cache of version {version}, and this version of potstill reads {VERSION}; make it again"
            )
        try:
            return cls(**{**fields, "facts": CacheFacts(**fields["facts"])})
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{folder / MANIFEST} cannot be read ({error}); make the cache again") from error

    @property
    def has_only_log_probs(self) -> bool:
        """Whether a row is the log-probability of the next token alone (`teachers.log_prob_cache`)."""
        return self.kept == LOG_PROBS

    @property
    def is_sampled(self) -> bool:
        """Whether rows hold sampled tokens, whose expectation is the teacher's distribution."""
        return self.kept == "sampled"

    @property
    def format(self) -> CodecFormat:
        """The encoding of its rows."""
        return CodecFormat(self.facts.vocabulary, self.classes, self.exact)


def hash_window(ids: np.ndarray, labels: np.ndarray) -> int:
    """The key of a window: a hash of its tokens and label mask."""
    label_mask = np.packbits(labels != IGNORE)
    data = np.ascontiguousarray(ids, dtype="<i4").tobytes() + label_mask.tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def split_documents(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids and labels of each document of a packed batch; a continuation comes with its prompt, unlabeled."""
    assert len(batch["input_ids"]) == 1, "documents of one packed row"
    batch = repeat_prompts({name: batch[name] for name in ("input_ids", "labels", "position_ids", "documents")})
    lengths = torch.unique_consecutive(batch["documents"][0].cpu(), return_counts=True)[1]
    boundaries = np.cumsum(lengths.numpy())[:-1]
    return list(
        zip(*(np.split(batch[name][0].cpu().numpy(), boundaries) for name in ("input_ids", "labels")), strict=True)
    )


@dataclass(frozen=True)
class WindowLocation:
    """The location of a window: its shard, and its rows, ids and record there."""

    shard: int
    rows: slice
    ids: slice
    record: slice


class CacheFolder:
    """A complete cache: its manifest, its shards, and where each window lies in them.

    Raises: NotFound, ArtifactError for a folder that is not a complete cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.from_folder(folder)
        names = sorted(name for name in self.manifest.files if name.startswith("shard-"))
        self.shards = [self.open_file(name) for name in names]
        self._locations = {
            key: location
            for number, shard in enumerate(self.shards)
            for key, location in _read_locations(number, shard)
        }

    def open_file(self, name: str) -> Any:
        """A file of the cache, memory-mapped. Raises: ArtifactError."""
        try:
            return safe_open(self.folder / name, framework="np")
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.folder / name} cannot be read ({error}); make the cache again") from error

    def check_facts(self, expected_facts: Mapping[str, Any]) -> None:
        """Refuses a run whose facts differ from those of the cache.

        Raises: CacheMismatch, which names both values.
        """
        facts = asdict(self.manifest.facts)
        for name, value in expected_facts.items():
            if facts[name] != value:
                raise CacheMismatch(
                    f"the cache {self.folder} was made with {name} {_shorten_digest(facts[name])}, and this run has "
                    f"{_shorten_digest(value)}; use the sources it was made from, or make another cache"
                )

    def has_window(self, ids: np.ndarray, labels: np.ndarray) -> bool:
        """Whether the cache holds this window."""
        return hash_window(ids, labels) in self._locations

    def locate_windows(self, batch: Batch) -> list[WindowLocation]:
        """The locations of the windows of a packed batch that hold a row.

        Raises: CacheMismatch for a window that is not in the cache.
        """
        windows = split_documents(batch)
        if "targets" not in batch:  # a shared prompt has no rows, and a cache of whole documents has no window for it
            windows = [(ids, labels) for ids, labels in windows if (labels[1:] != IGNORE).any()]
        locations = [self._find_window(*window) for window in windows]
        return [location for location in locations if location.rows.stop > location.rows.start]

    def _find_window(self, ids: np.ndarray, labels: np.ndarray) -> WindowLocation:
        key = hash_window(ids, labels)
        if key not in self._locations:
            raise CacheMismatch(
                f"a window of {len(ids)} tokens is not in the cache {self.folder}; make one of this data set"
            )
        return self._locations[key]


class TeacherCache(CacheFolder):
    """A source of signals that reads the distributions in a cache.

    Raises: NotFound, ArtifactError for a folder that is not a complete cache; UsageError for log-probabilities alone.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if self.manifest.has_only_log_probs:
            raise UsageError(
                f"the cache {folder} holds log-probabilities of the text alone, for potstill align; make one without "
                f"--own"
            )
        with self.open_file(CLASSES) as file:
            classes = torch.from_numpy(file.get_tensor("classes").astype(np.int64))
        self.members = torch.nn.functional.one_hot(classes, self.manifest.classes).float()

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """The teacher's distributions for a packed batch, as `CoarseDistribution`.

        Raises: CacheMismatch for a window that is not in the cache; UnsupportedModel for signals that are not stored.
        """
        check_needs_only_rows(needs)
        locations, device = self.locate_windows(batch), batch["input_ids"].device
        coarse_rows = (
            concatenate([self._read_rows(location) for location in locations]) if locations else self._make_empty_rows()
        )
        device_rows = CoarseDistribution(
            *(
                tensor.to(device)
                for tensor in (coarse_rows.ids, coarse_rows.log_p, coarse_rows.log_rest, coarse_rows.members)
            )
        )
        signals = Signals(rows=torch.arange(len(device_rows), device=device), logits=device_rows.select_rows)
        return select_supervised_rows(signals, batch, needs)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The teacher's last hidden states [N D] of a packed batch, in bfloat16.

        Raises: CacheMismatch for a window that is not in the cache; UnsupportedModel if the cache stores none.
        """
        if not self.manifest.hidden:
            raise UnsupportedModel(f"the cache {self.folder} stores no hidden states; make it with --hidden")
        parts = [
            self.shards[location.shard].get_slice("hidden")[location.rows] for location in self.locate_windows(batch)
        ]
        width = self.shards[0].get_slice("hidden").get_shape()[1]
        hidden = np.concatenate([np.zeros((0, width), np.uint16), *parts])
        return torch.from_numpy(hidden).view(torch.bfloat16).to(batch["input_ids"].device)

    def _read_rows(self, location: WindowLocation) -> CoarseDistribution:
        manifest, slices = self.manifest, {"record": location.record}
        if manifest.exact:
            log_rest_slice = slice(location.rows.start * manifest.classes, location.rows.stop * manifest.classes)
            slices |= {"log_p": location.ids, "log_rest": log_rest_slice}
        arrays = {name: self.shards[location.shard].get_slice(name)[part] for name, part in slices.items()}
        return decode(arrays, location.rows.stop - location.rows.start, self.members, manifest.format)

    def _make_empty_rows(self) -> CoarseDistribution:
        log_rest = torch.zeros(0, self.manifest.classes)
        return CoarseDistribution(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1), log_rest, self.members)


def check_needs_only_rows(needs: Needs) -> None:
    """Refuses needs beyond rows, which are all that a cache stores.

    Raises: UnsupportedModel.
    """
    if needs.layers or needs.relations or needs.extras:
        raise UnsupportedModel(
            "a cache stores outputs of a teacher only, and the objective needs more; use a loaded teacher"
        )


def list_caches(folder: Path) -> list[Path]:
    """The caches in `folder`: the folder itself, and those directly below it.

    Raises: NotFound if there is no such folder.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}")
    return [path for path in (folder, *sorted(folder.iterdir())) if is_cache(path)]


def is_cache(folder: Path) -> bool:
    """Whether a folder is a cache. Other programs write files called manifest.json too."""
    file = folder / MANIFEST
    return file.is_file() and KIND in file.read_text(encoding="utf-8", errors="replace")


def remove_cache(folder: Path) -> int:
    """Removes the cache `folder`, and returns the number of bytes freed.

    Raises: NotFound, ArtifactError if it is not a cache; UsageError if it holds other files.
    """
    files = {MANIFEST, CARD_FILE, PROGRESS, *_load_manifest(folder).get("files", ())}
    if unknown_names := sorted(path.name for path in folder.iterdir() if path.name not in files):
        raise UsageError(f"{folder} holds {unknown_names[0]}, which is not part of the cache; move it elsewhere first")
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    return num_bytes


def _load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache of any version, without its kind."""
    file = folder / MANIFEST
    if not file.is_file():
        raise NotFound(f"{folder} is not a teacher cache (it has no {MANIFEST}); make one with potstill cache")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        kind, _ = manifest.pop("kind"), manifest["version"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); make the cache again") from error
    if kind != KIND:
        raise ArtifactError(f"{file} is the manifest of a {kind}, not of a teacher cache")
    return dict(manifest)


def find_faults(folder: Path) -> Iterator[str]:
    """Yields a description of each missing or altered file of a cache.

    Raises: NotFound, ArtifactError if there is no manifest to compare with.
    """
    for name, digest in Manifest.from_folder(folder).files.items():
        file = folder / name
        if not file.is_file():
            yield f"{name} is missing"
        elif hash_file(file) != digest:
            yield f"{name} is altered"


def _read_locations(number: int, shard: Any) -> Iterator[tuple[int, WindowLocation]]:
    keys, *ends = (shard.get_tensor(name) for name in ("keys", "row_ends", "id_ends", "record_ends"))
    starts = [np.concatenate([[0], end[:-1]]) for end in ends]
    for i, key in enumerate(keys.tolist()):
        yield key, WindowLocation(number, *(slice(int(a[i]), int(b[i])) for a, b in zip(starts, ends, strict=True)))


def _shorten_digest(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
