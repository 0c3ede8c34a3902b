"""Is the loss right for this teacher, this student and this text? The invariants, on the user's own pair."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core import backend
from potstill.core.errors import DataError, PotstillError, VocabularyMismatch
from potstill.core.types import IGNORE, Batch
from potstill.data.cache import Cache
from potstill.data.chat import tokenise
from potstill.data.corpus import load_corpus
from potstill.data.pack import Pack, Packs, collate, pack
from potstill.evaluate.perplexity import bos_of
from potstill.models.load import Loaded, load
from potstill.models.vocabulary import shared_ids
from potstill.pipeline.examination import FAIL, Check, World, examine
from potstill.pipeline.invariants import ALL, other_tokens
from potstill.pipeline.stage import as_value
from potstill.pipeline.texts import columns_of

READ = 50_000  # tokens of the text that packs are drawn from
DOCUMENTS, LENGTH = 3, 48  # of the small batch: enough for packing to show, and a second on a laptop


class Unsound(PotstillError):
    """An invariant does not hold, so that training would be wrong in silence."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Examines `teacher` and `student` (by default the teacher itself) on `data`, within a minute for small models."""

    teacher: str
    student: str | None = None
    data: str = "stdlib"
    columns: str = ""
    teacher_cache: str | None = None
    context: int = 512
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return as_value(self)

    def run(self) -> list[Check]:
        """Every check that applies.

        Raises: NotFound, UsageError, UnsafeModel and the like, as training would.
        """
        device, compute = backend.device(self.device), backend.dtype(self.dtype, on=str(backend.device(self.device)))
        cache = None if self.teacher_cache is None else Cache(Path(self.teacher_cache).expanduser())
        teacher = self._load(self.teacher)
        twin = replace(teacher, model=copy.deepcopy(teacher.model)) if self.student is None else None
        student = twin or self._load(str(self.student))
        try:
            vocabulary = shared_ids(teacher.tokenizer, student.tokenizer)
        except VocabularyMismatch as error:
            return [other_tokens(error)]
        corpus = load_corpus(self.data, columns=columns_of(self.columns))
        try:
            packs = self._packs(corpus, student.tokenizer, cache)
        except DataError as error:
            why = "prompts are given when it is asked, and answers are what is learnt"
            return [Check.of("text to train on", False, found=str(error), why=why, remedy="")]
        world = world_of(
            packs,
            student=student.model.to(device),
            student_tokenizer=student.tokenizer,
            teacher=teacher.model.to(device=device, dtype=compute),
            teacher_tokenizer=teacher.tokenizer,
            vocabulary=vocabulary,
            kind=corpus.kind,
            compute=compute,
            cache=cache,
        )
        return list(examine(world, ALL))

    def _load(self, name: str) -> Loaded:
        return load(name, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)

    def _packs(self, corpus: Any, tokenizer: PreTrainedTokenizerBase, cache: Cache | None) -> Packs:
        read = tokenise(corpus, tokenizer, limit=READ)
        held = None if cache is None else cache.holds
        return pack(read, length=self.context, seed=self.seed, bos=bos_of(tokenizer), only=held)


def world_of(
    packs: Packs,
    *,
    student: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    kind: str,
    compute: torch.dtype,
    cache: Cache | None = None,
) -> World:
    """What is examined, from packs that are about to be trained on."""
    return World(
        student=student,
        student_tokenizer=student_tokenizer,
        teacher=teacher,
        teacher_tokenizer=teacher_tokenizer,
        vocabulary=vocabulary,
        batch=_on(few(packs), student.device),
        whole=_on(collate([packs[0]]), student.device),
        kind=kind,
        stops=stopped(packs, stop_ids(student_tokenizer, student)),
        trained=packs.trained / (packs.tokens - len(packs.lengths)),
        compute=compute,
        cache=cache,
    )


def require_sound(checks: Sequence[Check]) -> list[dict[str, str]]:
    """The checks as a card keeps them.

    Raises: Unsound with the first that failed.
    """
    for check in checks:
        if check.outcome == FAIL:
            raise Unsound(f"{check.name}: {check.found}; {check.remedy or check.why} (or give --skip-doctor)")
    return [{"name": check.name, "outcome": f"{check.outcome}: {check.found}"} for check in checks]


def few(packs: Packs) -> Batch:
    """Some short documents of the packs end to end; of a longer one, a stretch that holds tokens to train on."""
    stretches = (_stretch(*document) for i in range(len(packs)) for document in _documents(packs[i]))
    return collate(list(islice(stretches, DOCUMENTS)))


def _documents(one: Pack) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels of each document of a pack."""
    return zip(*(one[name].split(one["lengths"].tolist()) for name in ("input_ids", "labels")), strict=True)


def _stretch(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A document from before its first trained token on."""
    start = int((labels != IGNORE).nonzero()[0]) - 1
    ids, labels = ids[start : start + LENGTH], labels[start : start + LENGTH].clone()
    labels[0] = IGNORE
    return {"input_ids": ids, "labels": labels, "lengths": torch.tensor([len(ids)])}


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> set[int]:
    """The ids with which an answer may end: end of text, those of the model's generation, and other special tokens."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    several = ends if isinstance(ends, list) else [ends]
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return {i for i in (*several, *special, *tokenizer.all_special_ids) if i is not None}


def stopped(packs: Packs, stops: set[int]) -> float:
    """The share of documents, of those that were not cut, whose last trained token is one of `stops`."""
    ends = packs.lengths.cumsum()
    found = [
        _last(packs.labels[end - size : end]) in stops
        for end, size in zip(ends.tolist(), packs.lengths.tolist(), strict=True)
        if size < packs.length
    ]
    return sum(found) / max(len(found), 1)


def _last(labels: Any) -> int:
    trained = labels[labels != IGNORE]
    return int(trained[-1]) if len(trained) else IGNORE


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: values.to(device) for name, values in batch.items()}
