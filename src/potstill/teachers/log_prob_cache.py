"""A cache of the log-probabilities of the text itself: 4 bytes a row, in the files of `teachers.cached`.

It takes the place of a frozen reference in training, whose distributions no loss of preferences reads. The model that
writes it computes in the precision of a policy: float32 weights, and products in `dtype`. A copy in bfloat16 rounds
otherwise, and the log-ratio of two equal models would not be 0.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.types import (
    NEXT_TOKEN_LOG_P,
    Batch,
    Needs,
    Signals,
    move_batch,
    select_supervised_rows,
    supervised_positions,
)
from potstill.data.packing import collate
from potstill.models.inference import inference_context
from potstill.models.load import LoadedModel
from potstill.models.signals import compute_signals
from potstill.objectives.row_terms import compute_target_log_probs
from potstill.teachers.cache_folder import read_progress
from potstill.teachers.cache_writer import CachedWindow, compute_facts, measure_files, write_shards
from potstill.teachers.cached import (
    LOG_PROBS,
    CacheFacts,
    CacheFolder,
    Manifest,
    check_needs_only_rows,
    hash_window,
    split_documents,
)


class LogProbCache(CacheFolder):
    """A source of signals that gives log p(next token) of each row, and no distributions.

    Raises: NotFound, ArtifactError for a folder that is not a complete cache; UsageError for one of distributions.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if not self.manifest.has_only_log_probs:
            raise UsageError(
                f"the cache {folder} holds distributions of {self.manifest.kept} tokens, which do not give the "
                f"log-probability of each answer; make one with potstill cache --own"
            )

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """The log-probabilities of a packed batch, as the score `NEXT_TOKEN_LOG_P`.

        Raises: CacheMismatch for a window that is not in the cache; UnsupportedModel for signals that are not stored.
        """
        check_needs_only_rows(needs)
        parts = [
            self.shards[location.shard].get_slice("log_p")[location.rows] for location in self.locate_windows(batch)
        ]
        log_p = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts])).to(batch["input_ids"].device)
        rows = torch.arange(len(log_p), device=log_p.device)
        signals = Signals(rows=rows, logits=_refuse_logits, scores={NEXT_TOKEN_LOG_P: log_p})
        return select_supervised_rows(signals, batch, needs)


def _refuse_logits(rows: Tensor) -> NoReturn:
    raise UnsupportedModel("a cache of log-probabilities has no distributions; run the reference instead")


@dataclass(frozen=True, kw_only=True)
class LogProbWriter:
    """Writes log-probabilities of `teacher` on a data set of packs, with float32 weights and products in `dtype`."""

    teacher: LoadedModel
    packs: Any
    dtype: torch.dtype
    seed: int

    def compute_facts(self, text_digest: str, *, context: int) -> CacheFacts:
        """The facts of the cache."""
        return compute_facts(self.teacher, text_digest, context=context, dtype=self.dtype)

    def build_manifest(self, folder: Path, facts: CacheFacts, names: Mapping[str, str]) -> Manifest:
        """The manifest of the finished shards in `folder`; `names` are those of teacher, data set and columns."""
        files = read_progress(folder)
        absent: dict[str, Any] = {"top_k": 0, "mass": 0.0, "classes": 0, "exact": True, "hidden": False}
        counts: dict[str, Any] = {**absent, **measure_files(folder, files)}
        return Manifest(facts=facts, names=names, kept=LOG_PROBS, **counts, seed=self.seed, files=files)

    def write(self, folder: Path, *, on_progress: Callable[[int], None]) -> None:
        """Writes all missing shards, as `cache_writer.write_shards` does."""
        write_shards(folder, len(self.packs), self._encode_windows, on_progress=on_progress)

    def _encode_windows(self, number: int) -> Iterator[CachedWindow]:
        model = self.teacher.model
        batch = move_batch(collate([self.packs[number]]), model.device)
        positions, targets, owners = supervised_positions(batch)
        with inference_context(model, dtype=self.dtype):
            signals = compute_signals(model, batch, Needs(positions), vocabulary=self.teacher.vocabulary)
            log_p = compute_target_log_probs(signals, targets).float().cpu()
        if log_p.isnan().any():
            raise UnsupportedModel(f"{self.teacher.name} computes logits that are NaN; repair the model first")
        documents = split_documents(batch)
        counts = torch.bincount(owners.cpu(), minlength=len(documents)).tolist()
        for (ids, labels), rows in zip(documents, log_p.split(counts), strict=True):
            arrays = {"log_p": rows.numpy(), "record": np.zeros(0, np.uint8)}
            yield CachedWindow(hash_window(ids, labels), len(rows), 0, arrays)
