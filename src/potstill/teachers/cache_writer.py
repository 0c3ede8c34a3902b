"""Writes a teacher's cache: its probabilities for every window of a data set, shard by shard (see `teachers.cached`).

The progress file has the digests of all finished shards, so that a stopped run continues after the last one
(`teachers.cache_folder`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from potstill.core.atomic_files import atomic_file, hash_file
from potstill.core.device import get_dtype_name
from potstill.core.errors import UnsupportedModel
from potstill.core.types import Batch, Needs, Signals, move_batch, supervised_positions
from potstill.data.packing import Packs, collate
from potstill.models.fingerprint import fingerprint_teacher, fingerprint_tokenizer
from potstill.models.load import LoadedModel
from potstill.models.signals import compute_signals
from potstill.models.tokenizers.vocabulary import count_token_ids
from potstill.ops.coarse import CoarseDistribution, coarsen, concatenate, tail_probabilities
from potstill.ops.kmeans import kmeans
from potstill.teachers.cache_codec import CodecFormat, encode
from potstill.teachers.cache_folder import read_progress, write_progress
from potstill.teachers.cached import CLASSES, CacheFacts, Manifest, hash_window, split_documents

PACKS_PER_SHARD = 128
ROWS_PER_CHUNK = 256  # rows whose logits are in memory at once
CLASS_PACKS = 4  # packs that the classes of tokens are computed from


@dataclass(frozen=True)
class CachedWindow:
    """One window of a shard: its key, the number of its rows and of the token ids in them, and its arrays."""

    key: int
    num_rows: int
    num_ids: int
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class CacheWriter:
    """Writes the probabilities of `teacher` on `packs`. The options are those of `stages.cache_teacher`."""

    teacher: LoadedModel
    packs: Packs
    top_k: int
    mass: float
    classes: int
    sampled: int
    exact: bool
    hidden: bool
    temperature: float
    seed: int

    def compute_facts(self, text_digest: str, *, context: int) -> CacheFacts:
        """The facts of the cache: digests of teacher, tokenizer and data set, and the options that a run must share."""
        dtype, temperature = self.teacher.model.dtype, self.temperature
        return compute_facts(self.teacher, text_digest, context=context, dtype=dtype, temperature=temperature)

    def build_manifest(self, folder: Path, facts: CacheFacts, names: Mapping[str, str]) -> Manifest:
        """The manifest of the finished shards in `folder`; `names` are those of teacher, data set and columns."""
        files = {**read_progress(folder), CLASSES: hash_file(folder / CLASSES)}
        return Manifest(
            facts=facts,
            names=names,
            kept="sampled" if self.sampled else "top-k",
            top_k=self.sampled or self.top_k,
            mass=self.mass,
            classes=self.classes,
            exact=self.exact,
            hidden=self.hidden,
            **measure_files(folder, files),
            seed=self.seed,
            files=files,
        )

    def load_token_classes(self, folder: Path) -> Tensor:
        """The class of each token as one-hot rows `[V C]`: computed from the first packs once, then read from a file.

        Tokens are clustered by their rows in the output layer, weighted by their mass outside the top k.
        """
        file = folder / CLASSES
        if not file.exists():
            token_classes = self._compute_token_classes()
            with atomic_file(file) as staging_file:
                save_file({"classes": token_classes.numpy().astype(np.uint8)}, staging_file)
        token_classes = torch.from_numpy(load_file(file)["classes"].astype(np.int64))
        return torch.nn.functional.one_hot(token_classes, self.classes).float()

    def _compute_token_classes(self) -> Tensor:
        teacher_signals = self._compute_signals(range(min(CLASS_PACKS, len(self.packs))))[0]
        if teacher_signals.head is None or self.classes == 1 or self.sampled:
            return torch.zeros(count_token_ids(self.teacher.tokenizer), dtype=torch.long)
        tails = [
            tail_probabilities(teacher_signals.logits(chunk).float(), self.top_k).sum(0)
            for chunk in teacher_signals.rows.split(ROWS_PER_CHUNK)
        ]
        weight = torch.stack(tails).sum(0).cpu()
        return kmeans(teacher_signals.head.weight.float().cpu(), weight, self.classes, seed=self.seed)

    def write(self, folder: Path, *, on_progress: Callable[[int], None]) -> None:
        """Writes the classes of tokens and all missing shards."""
        self.write_shards(folder, self.load_token_classes(folder), on_progress=on_progress)

    def write_shards(self, folder: Path, members: Tensor, *, on_progress: Callable[[int], None]) -> None:
        """Writes all missing shards, as the function `write_shards` does; `members [V C]` are the classes of tokens."""
        members = members.to(self.teacher.model.device)
        write_shards(folder, len(self.packs), lambda i: self._encode_windows(i, members), on_progress=on_progress)

    def _compute_signals(self, pack_numbers: range) -> tuple[Signals, Batch]:
        model = self.teacher.model
        batch = move_batch(collate([self.packs[i] for i in pack_numbers]), model.device)
        needs = Needs(supervised_positions(batch)[0])
        return compute_signals(model, batch, needs, vocabulary=count_token_ids(self.teacher.tokenizer)), batch

    def _encode_windows(self, number: int, members: Tensor) -> Iterator[CachedWindow]:
        """The windows of pack `number` as they are stored."""
        teacher_signals, batch = self._compute_signals(range(number, number + 1))
        if self.hidden and teacher_signals.head is None:
            raise UnsupportedModel(
                f"{self.teacher.name} has no output layer that turns hidden states into logits; remove --hidden"
            )
        distributions = self._compress_rows(teacher_signals, members, number)
        owners = supervised_positions(batch)[2].cpu()
        codec = CodecFormat(len(members), self.classes, self.exact)
        start = 0
        for document, (ids, labels) in enumerate(split_documents(batch)):
            num_rows = int((owners == document).sum())
            rows = distributions[start : start + num_rows]
            arrays = encode(rows, codec)
            if self.hidden:
                states = teacher_signals.rows[start : start + num_rows]
                arrays["hidden"] = states.bfloat16().cpu().view(torch.uint16).numpy()
            yield CachedWindow(hash_window(ids, labels), num_rows, int((~rows.log_p.isneginf()).sum()), arrays)
            start += num_rows

    def _compress_rows(self, teacher_signals: Signals, members: Tensor, number: int) -> CoarseDistribution:
        """The distributions of all rows of pack `number`, on the CPU.

        Raises: UnsupportedModel for logits that are not numbers.
        """
        generator = torch.Generator(members.device).manual_seed(self.seed * 2**32 + number)
        distributions = concatenate(
            [
                self._compress_logits(teacher_signals.logits(chunk), members, generator)
                for chunk in teacher_signals.rows.split(ROWS_PER_CHUNK)
            ]
        )
        if distributions.log_p.isnan().any():
            raise UnsupportedModel(f"{self.teacher.name} computes logits that are NaN; repair the model first")
        return CoarseDistribution(
            distributions.ids.cpu(), distributions.log_p.cpu(), distributions.log_rest.cpu(), members
        )

    def _compress_logits(self, logits: Tensor, members: Tensor, generator: torch.Generator) -> CoarseDistribution:
        logits = logits.float() / self.temperature
        if not self.sampled:
            return coarsen(logits, self.top_k, members, mass=self.mass)
        samples = torch.multinomial(logits.softmax(-1), self.sampled, replacement=True, generator=generator)
        weight = torch.full_like(samples, 1 / self.sampled, dtype=logits.dtype)
        frequencies = torch.zeros_like(logits).scatter_add_(-1, samples, weight)
        return coarsen(frequencies.log(), int((frequencies > 0).sum(-1).max()), members)


def compute_facts(
    teacher: LoadedModel, text_digest: str, *, context: int, dtype: torch.dtype, temperature: float = 1.0
) -> CacheFacts:
    """The facts of a cache of `teacher`, whose products are in `dtype`."""
    return CacheFacts(
        **fingerprint_teacher(teacher),
        dtype=get_dtype_name(dtype),
        **fingerprint_tokenizer(teacher.tokenizer),
        text=text_digest,
        context=context,
        temperature=temperature,
        vocabulary=count_token_ids(teacher.tokenizer),
    )


def write_shards(
    folder: Path,
    num_packs: int,
    encode_windows: Callable[[int], Iterable[CachedWindow]],
    *,
    on_progress: Callable[[int], None],
) -> None:
    """Writes all missing shards of the windows that `encode_windows` gives for the number of each pack.

    Calls `on_progress` with the number of finished packs after each pack. A shard counts once it is complete and in the
    progress file.
    """
    shard_digests = read_progress(folder)
    for number in range(len(shard_digests), math.ceil(num_packs / PACKS_PER_SHARD)):
        name, windows = f"shard-{number:05}.safetensors", []
        for i in range(number * PACKS_PER_SHARD, min((number + 1) * PACKS_PER_SHARD, num_packs)):
            windows += list(encode_windows(i))
            on_progress(i + 1)
        with atomic_file(folder / name) as staging_file:
            save_file(build_shard(windows), staging_file)
        shard_digests[name] = hash_file(folder / name)
        write_progress(folder, shard_digests)


def measure_files(folder: Path, files: Iterable[str]) -> dict[str, int]:
    """The numbers of rows, windows and token ids in the shards among `files`, and the bytes of all files."""
    counts = [count_shard(folder / name) for name in files if name.startswith("shard-")]
    rows, windows, ids = (sum(column) for column in zip(*counts, strict=True))
    num_bytes = sum((folder / name).stat().st_size for name in files)
    return {"rows": rows, "windows": windows, "ids": ids, "bytes": num_bytes}


def build_shard(windows: Sequence[CachedWindow]) -> dict[str, np.ndarray]:
    """A shard: the arrays of windows end to end, their keys, and where the parts of each window end."""
    sizes = np.array(
        [(window.num_rows, window.num_ids, len(window.arrays["record"])) for window in windows], dtype=np.int64
    )
    arrays = {name: np.concatenate([window.arrays[name] for window in windows]) for name in windows[0].arrays}
    arrays |= dict(zip(("row_ends", "id_ends", "record_ends"), np.ascontiguousarray(sizes.cumsum(0).T), strict=True))
    return {**arrays, "keys": np.array([window.key for window in windows], dtype=np.uint64)}


def count_shard(shard: Path) -> tuple[int, int, int]:
    """The numbers of rows, windows and token ids in a shard."""
    with safe_open(shard, framework="np") as file:
        num_rows, num_ids = (int(file.get_tensor(name)[-1]) for name in ("row_ends", "id_ends"))
        return num_rows, len(file.get_tensor("keys")), num_ids
